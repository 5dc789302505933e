"""Many runs at a time: a search over the keys of an experiment."""
