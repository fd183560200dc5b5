"""Is the folder still the same model? Named checks, one file a family, and the verdict over them."""
