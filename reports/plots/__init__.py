"""The report's figures, as SVG text with the numbers behind them. The same records give the same bytes."""
