"""Lossless speculative decoding native to Hugging Face transformers.

Importing this package registers the model type `fspad` with `AutoConfig` and `AutoModel`, and lets
`target.generate(..., assistant_model=head)` use an FSPAD head.
"""

from transformers import AutoConfig, AutoModel

from .configuration_fspad import FSPADConfig
from .generation_fspad import FSPADGenerateOutput
from .modeling_fspad import FSPADModel, FSPADOutput

__version__ = "0.1.0"
__all__ = ["FSPADConfig", "FSPADGenerateOutput", "FSPADModel", "FSPADOutput"]

AutoConfig.register("fspad", FSPADConfig, exist_ok=True)
AutoModel.register(FSPADConfig, FSPADModel, exist_ok=True)
