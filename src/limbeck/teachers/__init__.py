"""Where supervision comes from: modules, ensembles, functions. Teachers are frozen and always in eval mode (`contract.Teacher`)."""

from __future__ import annotations

from limbeck.teachers.module import EnsembleTeacher, FunctionTeacher, ModuleTeacher, as_teacher

__all__ = ["EnsembleTeacher", "FunctionTeacher", "ModuleTeacher", "as_teacher"]
