"""Chapter 09: PPO-ptx on Ray + vLLM + DeepSpeed ZeRO-3."""
