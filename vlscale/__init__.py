"""vlscale: pretraining of the classic vision-language models on DeepSpeed.

Importing the package is cheap on purpose: torch is loaded only by the modules that compute.
"""

__version__ = "0.1.0"
