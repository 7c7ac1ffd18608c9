"""Everything that guards a report: its checklist, its manifest, its expected results, two sides compared."""
