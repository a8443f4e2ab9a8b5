"""The Python that Jinja makes of a template, with calls where the template could make much of little.

The environment has what is called: `counted_items`, `counted_text`, `counted_container`, `count_text`.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame


class CountingCodeGenerator(CodeGenerator):
    """Loops, `~`, lists and dictionaries, and the template's own text within macros."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        counted = nodes.EnvironmentAttribute("counted_items", lineno=node.lineno)
        node.iter = nodes.Call(counted, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.counted_text(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.counted_container(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.counted_container(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":  # names that are set
            super().visit_Tuple(node, frame)
            return
        self.write("environment.counted_container(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        num_chars = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if frame.buffer is not None and num_chars:
            self.writeline(f"environment.count_text(context, {num_chars})", node)
        super().visit_Output(node, frame)
