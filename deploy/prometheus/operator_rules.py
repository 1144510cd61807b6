"""Writes the rules of deploy/prometheus as the Prometheus operator takes them.

python deploy/prometheus/operator_rules.py --update deploy/kubernetes/components/service-monitor/prometheus-rule.yaml
"""

import sys
from pathlib import Path

from server.metrics.generated import write

RULES = Path(__file__).with_name("rules")
HEAD = """\
# The rules of deploy/prometheus/rules, written by deploy/prometheus/operator_rules.py: change them there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ryzanstein
  labels: # many a Prometheus takes only those with a label of its own, such as release: …
    app.kubernetes.io/name: ryzanstein
    app.kubernetes.io/component: server
spec:
  groups:
"""


def text() -> str:
    """Return the manifest: what is below `groups:` in each file of rules."""
    groups = (path.read_text(encoding="utf-8").partition("\ngroups:\n")[2] for path in sorted(RULES.glob("*.yml")))
    lines = (line for of_file in groups for line in of_file.splitlines())
    return HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines)


def main(arguments: list[str]) -> int:
    """Write the manifest to standard output, or into a file; return the exit code."""
    return write("deploy/prometheus/operator_rules.py", "Write the Prometheus operator's rules.", text(), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
