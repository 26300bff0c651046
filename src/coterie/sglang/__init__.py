"""A plug-in for SGLang, with which its diffusion models route by the policies of this package.

SGLang finds it by its entry point, and the environment configures it: see ``settings``.
"""
