"""Why a tensor differs from its original: the search for a cause that explains it bit for bit."""
