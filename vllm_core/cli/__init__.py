"""The command line: one command per file. No command's heavy imports before it runs."""
