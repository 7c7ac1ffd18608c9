"""The terminal side of every command: options and prompts that come in, text, tables and JSON that go out."""
