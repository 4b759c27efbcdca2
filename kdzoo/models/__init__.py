"""Models: whatever a recipe names becomes a folder that one loader reads."""
