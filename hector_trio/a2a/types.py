"""The data model of A2A 1.0 (specification 4, a2a.proto) as ProtoJSON: what is read, and what is written.

Unknown fields are ignored (5.7), enums are their full names (5.5), times are RFC 3339 in UTC (5.6.1), bytes base64.
What is not set is left out when it is written.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import force_setattr

VERSION: Final = "1.0"
"""``Major.Minor`` of the protocol that these types are of."""

MEDIA_TYPE: Final = "application/a2a+json"
"""Of bodies over HTTP+JSON, and of push notifications (14.1.1)."""

TaskState = Literal[
    "TASK_STATE_SUBMITTED",
    "TASK_STATE_WORKING",
    "TASK_STATE_COMPLETED",
    "TASK_STATE_FAILED",
    "TASK_STATE_CANCELED",
    "TASK_STATE_INPUT_REQUIRED",
    "TASK_STATE_REJECTED",
    "TASK_STATE_AUTH_REQUIRED",
]
Role = Literal["ROLE_USER", "ROLE_AGENT"]

TERMINAL: Final[frozenset[str]] = frozenset(
    {"TASK_STATE_COMPLETED", "TASK_STATE_FAILED", "TASK_STATE_CANCELED", "TASK_STATE_REJECTED"}
)
INTERRUPTED: Final[frozenset[str]] = frozenset({"TASK_STATE_INPUT_REQUIRED", "TASK_STATE_AUTH_REQUIRED"})

Object = dict[str, Any]
"""A ``google.protobuf.Struct``."""
Text = Annotated[str, Meta(min_length=1)]
"""A string that is required: in ProtoJSON an empty one is the same as none."""
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class Record(Struct, frozen=True, rename="camel", omit_defaults=True):
    """What all messages of the protocol have in common."""


# --- tasks and messages (4.1) -----------------------------------------------------------------------------------------


class Part(Record, frozen=True):
    """One piece of content: exactly one of ``text``, ``raw``, ``url`` and ``data`` is set."""

    text: str | None = None
    raw: bytes | None = None
    url: str | None = None
    data: Any = UNSET
    """Any JSON, ``null`` too; ``UNSET``: the part is of another kind."""
    metadata: Object | None = None
    filename: str | None = None
    media_type: str | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.raw is None and self.url is None and self.data is UNSET:
            return
        kinds = (self.text is not None) + (self.raw is not None) + (self.url is not None)
        if kinds == 1 and self.data is None:
            force_setattr(self, "data", UNSET)  # a null beside another kind says that this one is not set
        if kinds + (self.data is not UNSET) != 1:
            raise ValueError("A part has exactly one of text, raw, url and data")


class Message(Record, frozen=True):
    """One turn of a conversation."""

    message_id: Text
    role: Role
    parts: Annotated[list[Part], Meta(min_length=1)]
    context_id: str | None = None
    task_id: str | None = None
    metadata: Object | None = None
    extensions: list[str] | None = None
    reference_task_ids: list[str] | None = None


class Artifact(Record, frozen=True):
    """An output of a task."""

    artifact_id: Text
    parts: Annotated[list[Part], Meta(min_length=1)]
    name: str | None = None
    description: str | None = None
    metadata: Object | None = None
    extensions: list[str] | None = None


class TaskStatus(Record, frozen=True):
    state: TaskState
    message: Message | None = None
    timestamp: str | None = None


class Task(Record, frozen=True):
    id: Text
    status: TaskStatus
    context_id: str | None = None
    artifacts: list[Artifact] | None = None
    history: list[Message] | None = None
    metadata: Object | None = None


class TaskStatusUpdateEvent(Record, frozen=True):
    task_id: Text
    context_id: Text
    status: TaskStatus
    metadata: Object | None = None


class TaskArtifactUpdateEvent(Record, frozen=True):
    task_id: Text
    context_id: Text
    artifact: Artifact
    append: bool = False
    last_chunk: bool = False
    metadata: Object | None = None


class StreamResponse(Record, frozen=True):
    """Exactly one of them is set."""

    task: Task | None = None
    message: Message | None = None
    status_update: TaskStatusUpdateEvent | None = None
    artifact_update: TaskArtifactUpdateEvent | None = None


class SendMessageResponse(Record, frozen=True):
    """Exactly one of them is set."""

    task: Task | None = None
    message: Message | None = None


# --- push notifications (4.3) -----------------------------------------------------------------------------------------


class AuthenticationInfo(Record, frozen=True):
    scheme: Text
    credentials: str | None = None


class TaskPushNotificationConfig(Record, frozen=True):
    url: Text
    id: str | None = None
    task_id: str | None = None
    tenant: str | None = None
    token: str | None = None
    authentication: AuthenticationInfo | None = None


# --- requests and responses (3.2) -------------------------------------------------------------------------------------


class SendMessageConfiguration(Record, frozen=True):
    accepted_output_modes: list[str] | None = None
    task_push_notification_config: TaskPushNotificationConfig | None = None
    history_length: Int32 | None = None
    return_immediately: bool | None = None


class SendMessageRequest(Record, frozen=True):
    message: Message
    configuration: SendMessageConfiguration | None = None
    metadata: Object | None = None
    tenant: str | None = None


class GetTaskRequest(Record, frozen=True):
    id: Text
    history_length: Int32 | None = None
    tenant: str | None = None


class ListTasksRequest(Record, frozen=True):
    context_id: str | None = None
    status: TaskState | Literal["TASK_STATE_UNSPECIFIED"] | None = None
    page_size: Int32 | None = None
    page_token: str | None = None
    history_length: Int32 | None = None
    status_timestamp_after: str | None = None
    include_artifacts: bool | None = None
    tenant: str | None = None


class ListTasksResponse(Struct, frozen=True, rename="camel"):
    """All four are always written."""

    tasks: list[Task]
    next_page_token: str
    page_size: int
    total_size: int


class CancelTaskRequest(Record, frozen=True):
    id: Text
    metadata: Object | None = None
    tenant: str | None = None


class SubscribeToTaskRequest(Record, frozen=True):
    id: Text
    metadata: Object | None = None
    """Not in a2a.proto: where the resume extension has its ``after`` on bindings that carry it in the request."""
    tenant: str | None = None


class GetTaskPushNotificationConfigRequest(Record, frozen=True):
    task_id: Text
    id: Text
    tenant: str | None = None


class ListTaskPushNotificationConfigsRequest(Record, frozen=True):
    task_id: Text
    page_size: Int32 | None = None
    page_token: str | None = None
    tenant: str | None = None


class ListTaskPushNotificationConfigsResponse(Struct, frozen=True, rename="camel"):
    """Both are always written."""

    configs: list[TaskPushNotificationConfig]
    next_page_token: str = ""


class DeleteTaskPushNotificationConfigRequest(Record, frozen=True):
    task_id: Text
    id: Text
    tenant: str | None = None


class GetExtendedAgentCardRequest(Record, frozen=True):
    tenant: str | None = None


# --- the card (4.4, 4.5) ----------------------------------------------------------------------------------------------


class AgentInterface(Record, frozen=True):
    url: Text
    protocol_binding: Text
    protocol_version: Text
    tenant: str | None = None


class AgentProvider(Record, frozen=True):
    organization: Text
    url: Text


class AgentExtension(Record, frozen=True):
    uri: str = ""
    description: str | None = None
    required: bool = False
    params: Object | None = None


class AgentCapabilities(Record, frozen=True):
    """``None`` is "not said", which counts as no; a ``False`` is written."""

    streaming: bool | None = None
    push_notifications: bool | None = None
    extensions: list[AgentExtension] | None = None
    extended_agent_card: bool | None = None


class StringList(Record, frozen=True, rename={"items": "list"}):
    items: list[str] | None = None


class SecurityRequirement(Record, frozen=True):
    """Scopes by the names of security schemes."""

    schemes: dict[str, StringList] | None = None


class ApiKeySecurityScheme(Record, frozen=True):
    location: Text
    name: Text
    description: str | None = None


class HttpAuthSecurityScheme(Record, frozen=True):
    scheme: Text
    description: str | None = None
    bearer_format: str | None = None


class AuthorizationCodeOAuthFlow(Record, frozen=True):
    authorization_url: Text
    token_url: Text
    scopes: dict[str, str]
    refresh_url: str | None = None
    pkce_required: bool = False


class ClientCredentialsOAuthFlow(Record, frozen=True):
    token_url: Text
    scopes: dict[str, str]
    refresh_url: str | None = None


class ImplicitOAuthFlow(Record, frozen=True):
    authorization_url: str | None = None
    refresh_url: str | None = None
    scopes: dict[str, str] | None = None


class PasswordOAuthFlow(Record, frozen=True):
    token_url: str | None = None
    refresh_url: str | None = None
    scopes: dict[str, str] | None = None


class DeviceCodeOAuthFlow(Record, frozen=True):
    device_authorization_url: Text
    token_url: Text
    scopes: dict[str, str]
    refresh_url: str | None = None


class OAuthFlows(Record, frozen=True):
    """One of them is set."""

    authorization_code: AuthorizationCodeOAuthFlow | None = None
    client_credentials: ClientCredentialsOAuthFlow | None = None
    implicit: ImplicitOAuthFlow | None = None
    password: PasswordOAuthFlow | None = None
    device_code: DeviceCodeOAuthFlow | None = None


class OAuth2SecurityScheme(Record, frozen=True):
    flows: OAuthFlows
    description: str | None = None
    oauth2_metadata_url: str | None = None


class OpenIdConnectSecurityScheme(Record, frozen=True):
    open_id_connect_url: Text
    description: str | None = None


class MutualTlsSecurityScheme(Record, frozen=True):
    description: str | None = None


class SecurityScheme(Record, frozen=True):
    """One of them is set."""

    api_key_security_scheme: ApiKeySecurityScheme | None = None
    http_auth_security_scheme: HttpAuthSecurityScheme | None = None
    oauth2_security_scheme: OAuth2SecurityScheme | None = None
    open_id_connect_security_scheme: OpenIdConnectSecurityScheme | None = None
    mtls_security_scheme: MutualTlsSecurityScheme | None = None


class AgentSkill(Record, frozen=True):
    id: Text
    name: Text
    description: Text
    tags: Annotated[list[str], Meta(min_length=1)]
    examples: list[str] | None = None
    input_modes: list[str] | None = None
    output_modes: list[str] | None = None
    security_requirements: list[SecurityRequirement] | None = None


class AgentCardSignature(Record, frozen=True):
    protected: Text
    signature: Text
    header: Object | None = None


class AgentCard(Record, frozen=True):
    """Read leniently (the lists may be empty): what a client cannot do without is checked where it is used."""

    name: str
    description: str
    supported_interfaces: list[AgentInterface]
    version: str
    capabilities: AgentCapabilities
    default_input_modes: list[str]
    default_output_modes: list[str]
    skills: list[AgentSkill]
    provider: AgentProvider | None = None
    documentation_url: str | None = None
    security_schemes: dict[str, SecurityScheme] | None = None
    security_requirements: list[SecurityRequirement] | None = None
    signatures: list[AgentCardSignature] | None = None
    icon_url: str | None = None


encode: Final = msgspec.json.Encoder(decimal_format="number").encode


def is_unset(value: Any) -> bool:
    """Whether a part's ``data`` is not there (``null`` is)."""
    return isinstance(value, UnsetType)
