"""ALFWorld: household tasks, played by words, without TextWorld: games of its own files, or made here."""
