"""From a model and a config to a plan: which modules, in which groups, with how many templates."""
