"""`ctxkern taskweaver compare`: a hypernetwork, adapters that do not depend on the prompt, and the model alone."""
