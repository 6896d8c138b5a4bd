"""Makes models of other libraries faster: :func:`patch` puts fused ops under their own classes."""

from fastgen.backends import Explanation
from fastgen.integrations._explain import explain
from fastgen.integrations._patch import patch, unpatch
from fastgen.integrations._report import Report

__all__ = ["Explanation", "Report", "explain", "patch", "unpatch"]
