"""What shows each row of bad input, each code, each point of "Answers and events" and of section 4 of the contract."""

import ast
from pathlib import Path

import pytest

import memws

BAD_INPUT = {
    "no JSON, no object, wrong types, too deep, huge numbers, NaN, lone surrogates, NUL: server_error": [
        "test_server.py::test_bad_frames_get_one_sentence_and_the_connection_stays",
        "test_wire.py::test_hostile_frames_get_one_named_error",
        "test_wire.py::test_any_frame_is_a_request_or_a_named_error",
        "test_wire.py::test_no_error_quotes_more_than_80_characters",
        "test_server.py::test_the_largest_errors_are_small",
    ],
    "text that is not UTF-8: 1007; other breaches of RFC 6455: 1002": [
        "test_server.py::test_text_that_is_not_utf_8_closes_with_1007",
        "test_gate.py::test_breaches_of_the_standard_close",
    ],
    "a frame over 1 MiB: 1009": ["test_server.py::test_a_frame_over_the_limit_closes_with_1009"],
    "over the rate limit: rate_limited": ["test_server.py::test_the_rate_limit", "test_server.py::test_no_rate_limit"],
    "a taken name, a bad config, text over a limit, an unknown agent: an error and no change": [
        "test_server.py::test_a_name_is_taken_once",
        "test_server.py::test_bad_configs_change_nothing",
        "test_server.py::test_set_block",
        "test_server.py::test_an_unknown_agent_is_told_with_the_nearest",
    ],
    "a reader that does not read: 1013": ["test_server.py::test_a_reader_that_never_reads_is_closed"],
    "a foreign Origin or Host: 403; missing or several Hosts: 400": [
        "test_gate.py::test_foreign_origins_get_403",
        "test_gate.py::test_several_origins_get_403",
        "test_gate.py::test_foreign_hosts_get_403",
        "test_gate.py::test_no_or_several_hosts_get_400",
        "test_gate.py::test_the_gate_never_raises",
    ],
    "no or a wrong token: 401": ["test_gate.py::test_wrong_tokens_get_401", "test_gate.py::test_right_tokens_pass"],
    "one connection too many: 503": ["test_gate.py::test_one_connection_too_many_gets_503"],
    "a bind beyond loopback without a token": ["test_gate.py::test_beyond_loopback_needs_a_token"],
}

CODES = {
    "not_json": "test_wire.py::test_hostile_frames_get_one_named_error",
    "not_object": "test_wire.py::test_hostile_frames_get_one_named_error",
    "bad_type": "test_wire.py::test_hostile_frames_get_one_named_error",
    "bad_field": "test_server.py::test_a_config_that_is_no_object_is_a_bad_field",
    "missing_field": "test_wire.py::test_hostile_frames_get_one_named_error",
    "too_deep": "test_wire.py::test_depth_is_counted_exactly",
    "too_large": "test_server.py::test_a_frame_over_the_limit_closes_with_1009",
    "unknown_command": "test_wire.py::test_hostile_frames_get_one_named_error",
    "rate_limited": "test_server.py::test_the_rate_limit",
    "no_agent": "test_server.py::test_without_an_agent_nothing_is_current",
    "unknown_agent": "test_server.py::test_an_unknown_agent_is_told_with_the_nearest",
    "name_taken": "test_server.py::test_a_name_is_taken_once",
    "bad_config": "test_server.py::test_bad_configs_change_nothing",
    "block_limit": "test_server.py::test_set_block",
    "text_too_long": "test_server.py::test_what_never_becomes_a_turn_is_refused_once",
    "busy": "test_server.py::test_when_busy_reject",
    "conflict": "test_server.py::test_set_block",
    "not_found": "test_server.py::test_passages",
    "unknown_turn": "test_server.py::test_cancel_what_is_over",
    "unknown_seq": "test_server.py::test_an_unknown_seq_subscribes_nothing",
    "store_failed": "test_server.py::test_a_message_that_cannot_be_stored_is_refused",
    "internal": "test_errors.py::test_codes_are_those_of_the_contract",
    "queue_full": "test_server.py::test_eight_messages_of_a_connection_wait",
    "cancelled": "test_server.py::test_cancel_a_waiting_message",
    "turn_id_reused": "test_server.py::test_a_turn_that_is_over_sent_again",
    "context_overflow": "test_agent.py::test_an_overflow_that_cannot_be_helped",
    "model_auth": "test_server.py::test_a_failed_turn_has_one_error",
    "model_rate_limit": "test_agent.py::test_a_failure_that_is_final_ends_the_turn",
    "model_timeout": "test_agent.py::test_a_model_that_stalls_ends_the_turn",
    "model_unavailable": "test_server.py::test_a_failed_turn_has_one_error",
    "model_refused": "test_server.py::test_a_failed_turn_has_one_error",
    "bad_output": "test_agent.py::test_three_failed_calls_in_a_row_end_the_turn",
}

ANSWERS_AND_EVENTS = {
    "classic message types, their order within a step": [
        "test_server.py::test_the_flow_of_memgpt_0_2_7",
        "test_agent.py::test_the_events_of_a_step_are_in_the_order_of_0_2_7",
    ],
    "more types for a connection that asks": [
        "test_server.py::test_message_types_are_those_asked_for_last",
        "test_server.py::test_tool_calls_and_returns",
        "test_wire.py::test_message_types_are_those_of_the_contract",
    ],
    "a turn has one start, the receipt, and exactly one terminal frame": [
        "test_server.py::test_a_turn_begins_and_ends_once",
        "test_server.py::test_the_start_is_the_receipt",
        "test_server.py::test_at_the_terminal_frame_all_is_on_disk",
        "test_kill.py::test_twenty_kills_lose_nothing_and_double_nothing",
    ],
    "a message that never becomes a turn": [
        "test_server.py::test_what_never_becomes_a_turn_is_refused_once",
        "test_server.py::test_eight_messages_of_a_connection_wait",
        "test_server.py::test_thirty_two_messages_wait_for_an_agent",
        "test_kill.py::test_messages_that_waited_are_not_acknowledged",
    ],
    "seq: stored events, gapless, never reused for a name": [
        "test_server.py::test_seq_is_gapless_over_everything",
        "test_server.py::test_seq_goes_on_above_under_an_old_name",
        "test_server.py::test_deltas_are_live",
        "test_machine.py::test_whatever_clients_do",
    ],
    "a step is one transaction, one more before each call of a user's tool": [
        "test_agent.py::test_a_step_that_cannot_be_stored_leaves_nothing",
        "test_agent.py::test_the_step_up_to_a_tool_is_stored_before_it_runs",
        "test_agent.py::test_tools_of_the_user_run_between_transactions",
    ],
    "who gets what": [
        "test_server.py::test_no_frame_crosses_between_agents",
        "test_server.py::test_sender_and_subscribers_get_each_frame_once",
        "test_server.py::test_a_turn_goes_on_when_its_sender_leaves",
    ],
    "a turn_id sent again": [
        "test_server.py::test_a_waiting_turn_sent_again",
        "test_server.py::test_a_running_turn_sent_again",
        "test_server.py::test_a_turn_that_is_over_sent_again",
        "test_server.py::test_a_turn_id_sent_twice_at_once_runs_once",
        "test_kill.py::test_a_killed_turn_is_whole_and_never_runs_twice",
        "test_machine.py::test_whatever_clients_do",
    ],
    "a crash in mid-turn": [
        "test_agent.py::test_a_crash_while_a_tool_runs",
        "test_agent.py::test_a_crash_while_the_model_is_awaited",
        "test_kill.py::test_the_end_of_a_killed_turn_comes_before_a_new_one",
        "test_server.py::test_stop_ends_turns_cleanly",
        "test_kill.py::test_a_signal_ends_turns_and_connections_cleanly",
    ],
    "subscribe": [
        "test_server.py::test_subscribe_replays_and_goes_live",
        "test_server.py::test_subscribing_again_replaces",
        "test_server.py::test_a_slow_replay_is_not_a_slow_reader",
        "test_kill.py::test_a_subscriber_goes_on_where_it_was",
    ],
    "delete, rename": [
        "test_server.py::test_delete_and_restore_an_agent",
        "test_server.py::test_rename_agent",
        "test_server.py::test_a_busy_agent_is_deleted_by_force_only",
        "test_server.py::test_purge_forgets_for_ever",
        "test_machine.py::test_whatever_clients_do",
    ],
    "turns of one agent never overlap, those of different agents never wait": [
        "test_server.py::test_messages_wait_their_turn",
        "test_server.py::test_agents_never_wait_for_each_other",
        "test_server.py::test_a_blocking_tool_stops_nobody",
    ],
    "no frame exceeds 1 MiB": [
        "test_server.py::test_long_texts_come_in_parts",
        "test_server.py::test_no_character_makes_a_frame_too_long",
        "test_server.py::test_lists_hold_what_a_frame_can_hold",
    ],
    "frames are taken up and answered in order; cancel overtakes": [
        "test_server.py::test_answers_come_in_the_order_sent",
        "test_server.py::test_cancel_overtakes",
        "test_server.py::test_cancel_finds_a_message_sent_just_before",
    ],
    "id": [
        "test_server.py::test_an_id_is_on_answers_starts_terminals_and_refusals",
        "test_server.py::test_without_an_id_answers_have_none",
        "test_wire.py::test_a_bad_id_is_refused",
    ],
}

AGENT = {
    "1. history is never poisoned": [
        "test_misbehaviour.py::test_whatever_happens_talk_goes_on",
        "test_agent.py::test_a_broken_history_is_mended_and_told",
        "test_keeping.py::test_damage_is_no_fault_of_ours",
        "test_keeping.py::test_a_load_says_what_it_mended",
        "test_agent.py::test_a_tool_runs_once_for_one_call",
        "test_agent.py::test_cancel_at_any_event",
    ],
    "2. compaction is strictly smaller or a typed error; the warning; silent cuts": [
        "test_agent.py::test_a_long_conversation_in_a_small_window",
        "test_agent.py::test_the_agent_is_warned_once_before_the_window_is_full",
        "test_agent.py::test_an_overflow_that_only_the_endpoint_sees",
        "test_agent.py::test_an_overflow_that_cannot_be_helped",
        "test_agent.py::test_an_endpoint_that_cuts_prompts_silently_is_noticed",
    ],
    "3. a turn ends": [
        "test_agent.py::test_a_turn_has_at_most_max_steps",
        "test_agent.py::test_a_turn_has_a_token_budget",
        "test_agent.py::test_the_same_call_three_times_ends_the_turn",
        "test_agent.py::test_a_model_that_stalls_ends_the_turn",
        "test_agent.py::test_three_failed_calls_in_a_row_end_the_turn",
        "test_agent.py::test_a_failing_turn_makes_at_most_eight_calls",
    ],
    "4. cancel": [
        "test_agent.py::test_cancel_while_the_model_is_awaited",
        "test_agent.py::test_cancel_in_mid_stream_keeps_the_partial_reply",
        "test_agent.py::test_cancel_in_the_pause_before_a_retry",
        "test_agent.py::test_cancel_in_an_async_tool",
        "test_agent.py::test_cancel_in_a_sync_tool",
    ],
    "5. the ladder of corrections": [
        "test_agent.py::test_a_reply_that_can_be_read_reaches_the_user",
        "test_agent.py::test_an_unreadable_answer_is_asked_for_again_once",
    ],
    "6. nothing sent is executed; a tool sees its own agent only": [
        "test_layers.py::test_memws",
        "test_agent.py::test_a_tool_sees_its_own_agent_only",
    ],
    "7. the prompt only grows at its end; packing; login; heartbeats": [
        "test_agent.py::test_the_prompt_only_grows_at_its_end",
        "test_agent.py::test_the_system_message_is_rebuilt_by_an_edit_a_load_and_a_compaction",
        "test_agent.py::test_messages_are_packed_as_0_2_7_packed_them",
        "test_agent.py::test_create_and_load_call_no_model",
        "test_agent.py::test_a_login_precedes_a_message_after_an_hour_of_silence",
        "test_heartbeat.py::test_timed_heartbeats",
    ],
    "8. token counts are calibrated within bounds": ["test_agent.py::test_estimates_are_calibrated_within_bounds"],
}

MEMORY = {
    "one search for every script and any query": [
        "test_memory.py::test_every_script_is_found",
        "test_memory.py::test_hostile_queries_are_answered",
        "test_memory.py::test_hostile_queries_cost_no_more_than_a_plain_one",
    ],
    "memory_index is the same code": [
        "test_memory.py::test_positions_are_the_turns",
        "test_memory.py::test_any_query_is_answered",
        "test_embeddings.py::test_memory_index_by_vectors",
    ],
    "search_memory: stores, roles, times, pages that stay": [
        "test_server.py::test_search_memory",
        "test_server.py::test_search_memory_by_time",
        "test_memory.py::test_pages_over_the_wire_stay_while_messages_arrive",
        "test_embeddings.py::test_filters_hold_for_what_vectors_find",
        "test_embeddings.py::test_pages_stay_while_vectors_arrive",
    ],
    "embeddings are off unless a model is named": [
        "test_embeddings.py::test_without_a_model_nothing_is_embedded",
        "test_embeddings.py::test_what_shares_no_word_is_found",
        "test_embeddings.py::test_the_flag_names_the_model",
    ],
    "another model or dimension: anew in the background, with progress": [
        "test_embeddings.py::test_another_model_embeds_anew_and_tells",
        "test_embeddings.py::test_another_dimension_embeds_anew",
        "test_embeddings.py::test_searches_answer_while_all_is_embedded_anew",
        "test_embeddings.py::test_a_restart_embeds_nothing_twice",
    ],
    "embeddings are never in the way of a turn; an endpoint that fails is logged once": [
        "test_embeddings.py::test_turns_and_searches_go_on_while_embeddings_hang",
        "test_embeddings.py::test_faults_are_logged_once_and_leave_the_words",
        "test_embeddings.py::test_stop_while_embeddings_hang",
    ],
    "without an endpoint, without numpy": [
        "test_embeddings.py::test_without_an_endpoint_the_agent_says_so",
        "test_embeddings.py::test_without_numpy_the_flag_is_refused",
        "test_embeddings.py::test_without_numpy_a_config_gets_a_warning",
    ],
    "an SQLite without FTS5; a database written before": [
        "test_memory.py::test_without_fts5_searches_find_the_same",
        "test_memory.py::test_a_database_moves_between_both_kinds",
        "test_memory.py::test_an_old_database_is_indexed_on_opening",
        "test_memory.py::test_an_interrupted_indexing_goes_on",
    ],
}

KEEPING = {
    "check: damage in stored agents, mended after a backup": [
        "test_keeping.py::test_check_repair_and_go_on",
        "test_keeping.py::test_healthy_agents_are_found_healthy",
        "test_keeping.py::test_a_repair_needs_no_damage",
    ],
    "export and import: one agent, memory and history": [
        "test_keeping.py::test_an_imported_agent_is_the_exported_one",
        "test_keeping.py::test_a_damaged_export_is_refused",
        "test_keeping.py::test_what_an_import_takes_works",
        "test_keeping.py::test_a_name_in_use_is_refused",
        "test_keeping.py::test_an_export_holds_no_secret",
    ],
    "backup: a copy of the database, also while a server runs": [
        "test_keeping.py::test_a_backup_made_while_turns_run_is_whole",
        "test_keeping.py::test_a_backup_ends_however_much_is_written",
    ],
    "check, export and backup work beside a running server; check --repair and import need it stopped": [
        "test_cli.py::test_backup_beside_a_server",
        "test_keeping.py::test_an_export_is_of_one_moment",
        "test_keeping.py::test_a_check_is_of_one_moment",
    ],
}
"What section 1 says of keeping agents."

TABLES = (BAD_INPUT, ANSWERS_AND_EVENTS, AGENT, MEMORY, KEEPING)
NAMED = sorted({name for table in TABLES for names in table.values() for name in names} | set(CODES.values()))


@pytest.mark.parametrize("name", NAMED)
def test_what_the_table_names_exists(name: str) -> None:
    """Every test that the table names is there and runs something."""
    file, _, function = name.partition("::")
    tree = ast.parse((Path(__file__).parent / file).read_text("utf-8"))
    found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert function in {node.name for node in found}, f"no test {name}"


def test_every_code_of_the_module_is_in_the_table() -> None:
    """The codes that memws raises are those of the contract, no more and no fewer."""
    tree = ast.parse(Path(memws.__file__).read_text("utf-8"))
    raised = {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in {"Refused", "InvalidRequest", "ModelError"}
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    own = {kind.code for kind in vars(memws).values() if isinstance(kind, type) and issubclass(kind, memws.MemwsError)}
    assert raised | own - {"cannot_connect", "connection_lost"} <= CODES.keys()
    by_hand = {"unknown_agent", "too_large"}  # UnknownAgent's own; the WebSocket library closes with 1009 instead
    assert CODES.keys() - by_hand <= raised | own
