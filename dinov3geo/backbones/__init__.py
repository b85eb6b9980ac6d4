"""Images to `Features`. Imports only torch and safetensors."""
