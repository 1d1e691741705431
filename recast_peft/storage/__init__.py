"""Files: written whole, read with care, brought from the Hub and put there."""
