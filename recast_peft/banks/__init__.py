"""Template banks: in memory, in files, and grown."""
