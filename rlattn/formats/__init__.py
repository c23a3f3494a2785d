"""What a text means: pure parsers and writers. Imports no other room, and no torch."""
