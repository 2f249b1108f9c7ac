"""What A2A 1.0.1 demands of a server (each MUST, in our words) and the tests that show it; what it asks of others."""

from __future__ import annotations

from typing import NamedTuple


class Clause(NamedTuple):
    """One demand. ``tests`` show it; where there are none, ``why`` says whose it is."""

    id: str
    """The section, and a letter where it demands several things."""
    demand: str
    tests: tuple[str, ...] = ()
    why: str = ""


CLIENT = "a demand on clients"
SIGNING = "signed cards have tests of their own"
OPERATOR = "a demand on whoever operates the server"
PROJECT = "a demand on the protocol's own project"
NO_BINDING = "no binding of our own is on the card"

CLAUSES: tuple[Clause, ...] = (
    Clause(
        "1.4",
        "definitions come from the protocol's buffers",
        ("test_every_type_has_the_fields_of_the_protocols_buffers", "test_no_message_of_the_protocol_is_missing"),
    ),
    Clause("1.4b", "migration guides and anchors", why=PROJECT),
    Clause(
        "3.1.1",
        "a message is answered by a task or a message",
        ("test_a_message_is_answered_by_the_ended_task", "test_a_bare_message_answers_without_a_task"),
    ),
    Clause("3.1.2a", "a stream is one message, and closed", ("test_a_bare_message_answers_without_a_task",)),
    Clause(
        "3.1.2b",
        "or it begins with the task and closes when that has ended",
        ("test_a_stream_begins_with_the_task_and_ends_with_it",),
    ),
    Clause("3.1.2c", "progress shows at once", ("test_work_shows_before_the_first_word",)),
    Clause(
        "3.1.4a",
        "artifacts are left out of lists unless they are asked for",
        ("test_lists_have_the_last_changed_first_in_pages",),
    ),
    Clause(
        "3.1.4b",
        "the next page's token is always there, and empty at the end",
        ("test_lists_have_the_last_changed_first_in_pages", "test_what_is_not_set_is_not_written"),
    ),
    Clause("3.1.4c", "lists hold what the caller may see", ("test_what_is_somebody_elses_is_not_there",)),
    Clause(
        "3.1.4d",
        "lists go by cursors",
        ("test_lists_have_the_last_changed_first_in_pages", "test_a_list_that_is_asked_for_wrongly_is_refused"),
    ),
    Clause("3.1.4e", "the last changed comes first", ("test_lists_have_the_last_changed_first_in_pages",)),
    Clause(
        "3.1.5",
        "a task that has ended cannot be canceled",
        (
            "test_a_cancel_says_canceled_once_the_work_has_stopped",
            "test_two_cancels_at_once_are_answered_alike",
            "test_a_task_that_waits_for_input_can_be_canceled",
        ),
    ),
    Clause(
        "3.1.6a",
        "a subscription ends when the task does",
        (
            "test_a_subscriber_gets_the_task_as_it_is_and_misses_nothing_after",
            "test_subscribing_races_with_the_end_and_sees_it_whoever_wins",
        ),
    ),
    Clause(
        "3.1.6b",
        "its first event is the task as it is",
        ("test_a_subscriber_gets_the_task_as_it_is_and_misses_nothing_after",),
    ),
    Clause(
        "3.1.6c",
        "a task that has ended is not subscribed to",
        ("test_subscribing_to_what_has_ended_or_is_not_there_is_refused",),
    ),
    Clause(
        "3.1.7",
        "a webhook that is named is told of the task",
        (
            "test_configurations_are_created_got_listed_and_deleted",
            "test_a_webhook_is_told_what_a_subscriber_is_told_in_the_same_order",
        ),
    ),
    Clause(
        "3.1.8",
        "a configuration is told to whom it belongs, and to nobody else",
        (
            "test_over_http_they_are_the_same",
            "test_the_card_says_that_there_are_push_notifications_and_nobody_sees_those_of_others",
        ),
    ),
    Clause(
        "3.1.9", "all configurations of a task are listed", ("test_configurations_are_created_got_listed_and_deleted",)
    ),
    Clause(
        "3.1.10",
        "what is deleted is not told any more, however often it is deleted",
        ("test_a_configuration_that_is_deleted_is_not_told_any_more_and_one_that_is_replaced_goes_on",),
    ),
    Clause(
        "3.1.11",
        "the extended card is for authenticated clients",
        ("test_the_extended_card_is_for_who_has_shown_who_they_are",),
    ),
    Clause(
        "3.2.2a",
        "sending waits until the task has ended or is interrupted",
        (
            "test_a_message_is_answered_by_the_ended_task",
            "test_a_question_interrupts_and_a_message_to_the_task_answers_it",
        ),
    ),
    Clause("3.2.2b", "unless it is to return immediately", ("test_return_immediately_does_not_wait_for_the_end",)),
    Clause("3.2.4", "history is no longer than it is wanted", ("test_history_is_as_long_as_it_is_wanted",)),
    Clause(
        "3.3.2a",
        "bad credentials are refused",
        (
            "test_without_credentials_nothing_is_answered_but_the_card",
            "test_a_refusal_says_when_to_come_back_and_how_to_show_who_one_is",
        ),
    ),
    Clause("3.3.2b", "missing rights are refused", ("test_a_viewer_reads_and_does_nothing_else",)),
    Clause("3.3.2c", "what a client may not see does not exist for it", ("test_what_is_somebody_elses_is_not_there",)),
    Clause(
        "3.3.2d",
        "parameters are validated",
        (
            "test_a_message_that_is_none_is_refused_with_its_field",
            "test_a_list_that_is_asked_for_wrongly_is_refused",
            "test_a_body_that_is_none_is_refused",
        ),
    ),
    Clause(
        "3.3.2e",
        "what is not there is not found",
        (
            "test_a_message_to_a_task_that_is_not_there_or_has_ended_is_refused",
            "test_a_cancel_says_canceled_once_the_work_has_stopped",
        ),
    ),
    Clause(
        "3.3.2f",
        "errors have a code and a message, and typed details",
        (
            "test_the_codes_are_those_of_the_specification",
            "test_what_is_no_request_gets_the_code_for_it",
            "test_a_bug_is_an_internal_error_that_says_nothing",
        ),
    ),
    Clause(
        "3.3.4a",
        "without the capability, push operations are refused",
        ("test_every_operation_has_a_method", "test_where_there_are_none_the_card_and_every_operation_say_so"),
    ),
    Clause(
        "3.3.4b",
        "without the capability, streaming operations are refused",
        ("test_what_the_card_does_not_declare_is_refused",),
    ),
    Clause(
        "3.3.4c",
        "without the capability, there is no extended card",
        ("test_the_extended_card_is_for_who_has_shown_who_they_are",),
    ),
    Clause(
        "3.3.4d",
        "a required extension must be declared by the client",
        ("test_a_required_extension_must_be_declared", "test_an_agent_can_ask_for_an_extension_itself"),
    ),
    Clause(
        "3.4.1a",
        "a context that was made is told",
        ("test_a_context_is_a_session_and_keeps_the_conversation", "test_a_bare_message_answers_without_a_task"),
    ),
    Clause("3.4.1b", "a context that cannot be accepted is refused", ("test_a_context_that_a_client_names_is_kept",)),
    Clause(
        "3.4.2a",
        "every task has an id of its own, and it is told",
        ("test_a_context_is_a_session_and_keeps_the_conversation",),
    ),
    Clause(
        "3.4.2b",
        "a task that a message names must be there",
        ("test_a_message_to_a_task_that_is_not_there_or_has_ended_is_refused",),
    ),
    Clause(
        "3.4.3a",
        "the context follows from the task",
        ("test_a_question_interrupts_and_a_message_to_the_task_answers_it",),
    ),
    Clause(
        "3.4.3b",
        "a context that is not the task's is refused",
        ("test_a_message_whose_context_is_not_its_tasks_is_refused",),
    ),
    Clause(
        "3.5.2a",
        "events keep their order",
        (
            "test_a_stream_begins_with_the_task_and_ends_with_it",
            "test_many_subscribers_get_the_same_events_in_the_same_order",
        ),
    ),
    Clause(
        "3.5.2b",
        "all streams of a task get the same events in the same order",
        ("test_many_subscribers_get_the_same_events_in_the_same_order",),
    ),
    Clause(
        "3.5.2c",
        "closing a stream touches no other, and not the task",
        ("test_cutting_a_stream_never_stops_the_task", "test_a_subscriber_that_stalls_harms_nobody_and_loses_nothing"),
    ),
    Clause(
        "3.6a",
        "the patch number of a version does not count",
        ("test_a_version_is_major_and_minor_and_none_is_0_3", "test_a_method_of_1_0_needs_its_version"),
    ),
    Clause("3.6.1", "clients say their version", why=CLIENT),
    Clause(
        "3.6.2a",
        "a request has the semantics of its version",
        (
            "test_a_method_of_0_3_is_answered_in_0_3",
            "test_0_3_is_spoken_below_v1",
            "test_what_0_3_does_not_say_below_v1_is_false",
            "test_errors_below_v1_are_known_by_their_code_and_their_name",
        ),
    ),
    Clause(
        "3.6.2b",
        "other versions are refused",
        ("test_other_versions_are_refused", "test_a_path_of_1_0_needs_its_version"),
    ),
    Clause(
        "3.6.2c",
        "no version is 0.3",
        (
            "test_a_version_is_major_and_minor_and_none_is_0_3",
            "test_a_path_of_1_0_needs_its_version",
            "test_where_0_3_is_not_spoken_its_methods_are_unknown",
        ),
    ),
    Clause("3.7", "messages are no reliable delivery", why=CLIENT),
    Clause("4", "all bindings show the same data", ("test_both_bindings_see_the_same",)),
    Clause(
        "4.1.6",
        "a part is one thing",
        (
            "test_a_part_is_exactly_one_thing",
            "test_artifacts_come_back_as_they_were_made",
            "test_text_and_data_without_an_artifact_are_one_in_their_order",
        ),
    ),
    Clause(
        "4.3.3",
        "each update is sent as a StreamResponse, with the credentials, and at least once",
        (
            "test_a_webhook_is_told_what_a_subscriber_is_told_in_the_same_order",
            "test_what_fails_is_tried_again_and_nothing_overtakes_it",
        ),
    ),
    Clause(
        "4.6.3",
        "an extension that is not supported is ignored, unless required",
        ("test_a_required_extension_must_be_declared", "test_extensions_that_are_in_use_are_said"),
    ),
    Clause(
        "5.1",
        "bindings do the same, with the same errors and credentials",
        ("test_both_bindings_see_the_same", "test_without_credentials_nothing_is_answered_but_the_card"),
    ),
    Clause(
        "5.2",
        "all bindings are on the card",
        ("test_only_what_is_spoken_is_declared", "test_every_agent_is_one_of_a2a"),
    ),
    Clause(
        "5.4",
        "each error has its codes",
        ("test_the_codes_are_those_of_the_specification", "test_every_error_has_its_codes"),
    ),
    Clause("5.5a", "names are in camel case", ("test_every_type_has_the_fields_of_the_protocols_buffers",)),
    Clause(
        "5.5b",
        "enumerations are their names",
        ("test_unknown_fields_are_ignored_and_unknown_values_are_not", "test_states_of_the_end"),
    ),
    Clause(
        "5.6.1",
        "times are ISO 8601 in UTC",
        ("test_a_time_is_milliseconds_rounded_up", "test_lists_have_the_last_changed_first_in_pages"),
    ),
    Clause(
        "5.7",
        "required fields are there, required lists are not empty",
        ("test_a_message_that_is_none_is_refused_with_its_field", "test_a_card_has_all_that_is_required"),
    ),
    Clause("5.8", "custom bindings", why=NO_BINDING),
    Clause("7.1", "encryption in production", why=OPERATOR),
    Clause("7.4", "every request is authenticated", ("test_without_credentials_nothing_is_answered_but_the_card",)),
    Clause(
        "7.6.1a",
        "a permission is asked for by a task in its state, with a message",
        ("test_a_permission_is_asked_for_and_shows_on_both_faces",),
    ),
    Clause(
        "7.6.1b",
        "credentials can come from outside the conversation",
        ("test_a_stream_goes_on_while_a_permission_is_waited_for",),
    ),
    Clause("8.1", "there is a card", ("test_the_card_is_at_three_places",)),
    Clause(
        "8.3",
        "the card says where each binding is",
        ("test_the_card_is_at_three_places", "test_addresses_on_the_card_follow_the_public_address"),
    ),
    Clause("8.3.2", "clients choose by the card", why=CLIENT),
    Clause("8.4", "signatures", why=SIGNING),
    Clause(
        "9.2",
        "service parameters are headers",
        ("test_extensions_that_are_in_use_are_said", "test_a_method_of_1_0_needs_its_version"),
    ),
    Clause(
        "9.3",
        "requests are JSON-RPC 2.0",
        ("test_what_is_no_request_gets_the_code_for_it", "test_an_answer_has_the_id_of_its_request"),
    ),
    Clause("9.4", "each operation has its method", ("test_every_operation_has_a_method",)),
    Clause(
        "9.5",
        "details of errors are typed",
        ("test_what_is_no_request_gets_the_code_for_it", "test_the_codes_are_those_of_the_specification"),
    ),
    Clause(
        "10.1",
        "gRPC runs over HTTP/2 with TLS",
        (
            "test_a_message_is_sent_and_its_task_is_got_and_listed",
            "test_over_tls_http_1_1_is_spoken_on_the_same_port",
            "test_a_client_that_does_not_know_the_authority_sends_nothing",
        ),
    ),
    Clause(
        "10.2",
        "messages are the protocol's own",
        (
            "test_every_message_of_the_protocol_is_in_the_table_and_no_other",
            "test_every_field_has_its_number_and_its_kind",
            "test_the_official_codec_reads_what_is_written_and_what_it_writes_is_read",
        ),
    ),
    Clause(
        "10.3",
        "service parameters are metadata",
        ("test_another_version_is_refused", "test_a_stream_goes_on_behind_a_place_that_metadata_names"),
    ),
    Clause(
        "10.4", "each operation has its method", ("test_every_operation_has_its_message_and_every_error_its_status",)
    ),
    Clause(
        "10.6",
        "errors have their status and an ErrorInfo",
        ("test_an_error_carries_its_status_its_message_and_its_details", "test_an_error_of_a_stream_is_its_end"),
    ),
    Clause("10.7", "streams are those of the server", ("test_a_stream_begins_with_the_task_and_ends_with_its_end",)),
    Clause("11.2", "service parameters are headers", ("test_a_path_of_1_0_needs_its_version",)),
    Clause("11.3", "each operation has its path", ("test_every_path_means_its_operation_also_below_a_tenant",)),
    Clause(
        "11.5",
        "what has no body has its parameters in path and query, in camel case",
        ("test_numbers_and_booleans_are_texts_in_a_query", "test_lists_have_the_last_changed_first_in_pages"),
    ),
    Clause(
        "11.6",
        "errors are google.rpc.Status with an ErrorInfo",
        ("test_the_codes_are_those_of_the_specification", "test_a_wrong_method_says_which_are_right"),
    ),
    Clause("12", "custom bindings", why=NO_BINDING),
    Clause(
        "13.1a",
        "every operation checks who asks",
        ("test_what_is_somebody_elses_is_not_there", "test_a_viewer_reads_and_does_nothing_else"),
    ),
    Clause("13.1b", "filters widen nobody's view", ("test_what_is_somebody_elses_is_not_there",)),
    Clause(
        "13.2",
        "credentials are sent to the webhook; addresses inside are not called",
        (
            "test_a_webhook_is_told_what_a_subscriber_is_told_in_the_same_order",
            "test_addresses_inside_are_refused_when_they_are_named",
            "test_a_redirect_to_the_inside_is_not_followed",
        ),
    ),
    Clause(
        "13.3", "the extended card needs credentials", ("test_the_extended_card_is_for_who_has_shown_who_they_are",)
    ),
    Clause(
        "13.4",
        "input is validated, credentials stay secret",
        ("test_a_message_that_is_none_is_refused_with_its_field", "test_a_bug_is_an_internal_error_that_says_nothing"),
    ),
)

BEYOND = frozenset(
    {
        # promises of ours, or what the specification only recommends or allows
        "test_there_are_no_more_webhooks_than_allowed_of_a_task_and_in_all",
        "test_webhooks_go_with_their_session_and_do_not_delay_that",
        "test_what_no_header_can_hold_is_refused",
        "test_clients_of_the_old_dialect_set_get_list_and_delete_them",
        "test_one_in_the_place_of_another_that_was_over_is_told_what_comes",
        "test_a_rejection_is_a_state_of_its_own",
        "test_a_failure_says_what_failed",
        "test_an_agent_that_has_not_declared_replies_fails_loudly",
        "test_what_the_agent_does_not_take_is_refused",
        "test_an_agent_sees_all_parts_of_a_message",
        "test_a_message_to_a_task_that_works_is_refused",
        "test_the_same_answer_again_answers_once",
        "test_unknown_fields_are_ignored_and_names_with_underscores_are_read",
        "test_a_task_of_the_seed_is_a_task_of_a2a",
        "test_a_task_of_a2a_is_a_task_of_the_seed",
        "test_an_input_of_one_data_part_is_json",
        "test_what_is_ready_leaves_together_and_silence_is_a_comment",
        "test_an_error_in_the_middle_is_the_last_event",
        "test_below_v1_is_0_3",
        "test_other_paths_mean_nothing",
        "test_metrics_know_no_names_of_clients",
        "test_an_answer_is_in_the_media_type_that_the_client_speaks",
        "test_cancel_and_subscribe_may_have_an_empty_body",
        "test_a_tenant_in_the_path_leads_to_the_same_agent",
        "test_the_address_may_end_with_a_slash",
        "test_a_stream_of_0_3_says_which_event_is_its_last",
        "test_a_log_that_cannot_be_read_on_ends_the_stream_with_an_error",
        "test_a_card_can_be_cached",
        "test_the_extension_is_described_where_the_card_says",
        "test_only_cards_and_what_they_refer_to_are_public",
        "test_a_stream_that_waits_for_an_answer_ends_and_the_answers_goes_on",
        "test_a_body_that_is_something_else_is_told_so",
        "test_what_no_json_can_hold_is_refused",
        "test_a_silent_stream_says_that_it_is_there",
        "test_a_stream_is_open_while_an_agent_decides_how_to_answer",
        "test_leaving_a_blocking_send_does_not_stop_the_task",
        "test_a_stream_that_is_given_up_before_its_head_leaves_nothing_behind",
        "test_a_stream_goes_on_behind_the_last_event_that_a_client_has",
        "test_what_has_ended_can_be_resumed_from_any_place",
        "test_the_extension_gives_places_and_takes_them",
        "test_an_agent_without_the_extension_takes_no_places",
        "test_a_restart_in_the_middle_of_a_stream_loses_nothing",
        "test_everything_is_the_same_after_a_restart",
        "test_a_task_of_a_websocket_can_be_subscribed_to",
        "test_a_task_of_a2a_can_be_attached_to_on_a_websocket",
        "test_a_place_is_a_number_and_whether_work_was_told_of",
        "test_a_row_says_the_same_as_its_log",
        "test_a_task_that_ends_while_it_is_looked_at_has_no_output_in_its_history",
        "test_every_state_is_in_the_store",
        "test_when_the_log_is_gone_the_output_is_what_is_left",
        "test_bytes_and_free_values_arrive_as_they_are",
        "test_a_task_that_asks_is_answered",
        "test_a_task_is_subscribed_to_and_canceled",
        "test_webhooks_are_configured",
        "test_the_tenant_names_the_agent_and_nothing_the_default_one",
        "test_the_card_says_where_it_is_if_it_is_there",
        "test_a_compressed_message_is_read",
        "test_who_has_no_token_is_refused_in_the_words_of_grpc",
        "test_what_is_not_there_and_what_is_too_large_is_refused",
        "test_a_message_of_trailers_is_ascii_and_comes_back",
        "test_a_deadline_has_a_unit",
        "test_a_deadline_ends_the_call_and_not_the_task",
        "test_the_server_keeps_a_deadline_of_itself",
        "test_a_client_that_cancels_ends_its_stream_and_not_the_task",
        "test_a_stream_goes_on_while_others_call_on_the_same_connection",
        "test_a_stream_ends_when_its_token_expires_and_its_task_goes_on",
        "test_many_clients_stream_at_once",
        "test_a_message_that_is_none_is_refused_and_the_connection_goes_on",
        "test_a_stream_nobody_gives_a_window_to_is_cut_and_its_task_goes_on",
    }
)
"""Tests of the bindings that show no MUST."""
