"""`ryzanstein doctor`: what serving would run into, checked without serving."""
