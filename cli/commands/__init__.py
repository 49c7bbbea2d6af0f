"""One module per command. Each parses its options, calls the library, and prints."""
