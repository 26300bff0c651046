"""The parameter of a policy that meets a target: a search over given prompts."""
