"""Baltoro: the open system behind Kimi K2.5 (model, training, agentic RL, Agent Swarm, evaluation)."""

__version__ = "0.1.0"
