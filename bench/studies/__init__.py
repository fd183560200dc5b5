"""Commands that make the tables of docs/; not part of the way that a user takes."""
