"""CALVIN: chains of five subtasks told in language, in a simulator that the user brings."""
