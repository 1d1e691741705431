"""What joins RECAST to other libraries."""
