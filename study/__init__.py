"""Does a student gain from its teacher? A study on real images."""
