"""From JSON files and flags to one typed recipe, with every fault named at once. No torch in this room."""
