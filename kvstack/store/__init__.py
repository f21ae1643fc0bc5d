"""Keys and values of a group of layers come in, for rows of one length; attention's inputs and answers go out. What is
held, and all that moves tokens, is here; models, hooks and generate must not be known here."""
