"""What `apr-jax bench` measures: the model beside its peers and beside the limits of the machine, in one run."""
