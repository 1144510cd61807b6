"""The part of three custom resources' schemas that deploy/kubernetes uses: what is required, and no field beside."""

from typing import Any

Schema = dict[str, Any]


def _struct(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


DURATION = {"type": "string", "pattern": r"^(0|([0-9]+(ms|[smhdwy]))+)$"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 253}
LABELS = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": 64,
    "propertyNames": {"pattern": r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", "maxLength": 316},
    "additionalProperties": {"type": "string", "pattern": r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$"},
}
PORT = _struct({"number": {"type": "integer", "minimum": 1, "maximum": 65535}})
METADATA = _struct({"name": NAME}, {"namespace": NAME, "labels": LABELS})


def _resource(version: str, kind: str, spec: Schema) -> Schema:
    return _struct({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec})


SERVICE_MONITOR = _resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    _struct(
        {
            "selector": _struct({"matchLabels": LABELS}),
            "endpoints": {
                "type": "array",
                "minItems": 1,
                "items": _struct(
                    {"port": {"type": "string", "minLength": 1}},
                    {
                        "path": {"type": "string", "pattern": "^/"},
                        "interval": DURATION,
                        "scrapeTimeout": DURATION,
                        "scheme": {"enum": ["http", "https"]},
                    },
                ),
            },
        }
    ),
)
INFERENCE_POOL = _resource(
    "inference.networking.k8s.io/v1",
    "InferencePool",
    _struct(
        {
            "selector": _struct({"matchLabels": LABELS}),
            "targetPorts": {"type": "array", "minItems": 1, "maxItems": 8, "items": PORT},
            "endpointPickerRef": _struct(
                {"name": NAME},
                {
                    "group": {"type": "string"},
                    "kind": {"type": "string"},
                    "port": PORT,  # required where the kind is Service, which it is where it is left out
                    "failureMode": {"enum": ["FailOpen", "FailClose"]},
                },
            ),
        }
    ),
)
EXPR = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
RULE = {
    "oneOf": [
        _struct(
            {"record": {"type": "string", "pattern": "^[a-zA-Z_:][a-zA-Z0-9_:]*$"}, "expr": EXPR}, {"labels": TEXTS}
        ),
        _struct(
            {"alert": {"type": "string", "minLength": 1}, "expr": EXPR},
            {"for": DURATION, "keep_firing_for": DURATION, "labels": TEXTS, "annotations": TEXTS},
        ),
    ]
}
PROMETHEUS_RULE = _resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    _struct(
        {
            "groups": {
                "type": "array",
                "items": _struct({"name": EXPR}, {"interval": DURATION, "rules": {"type": "array", "items": RULE}}),
            }
        }
    ),
)
SCHEMAS = {"ServiceMonitor": SERVICE_MONITOR, "PrometheusRule": PROMETHEUS_RULE, "InferencePool": INFERENCE_POOL}
