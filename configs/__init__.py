"""The schema of recipes, how they are read, and all errors. Imports no tensor library."""
