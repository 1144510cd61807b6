"""What processes of the engine have in common that do one command in the place of the command line's."""
