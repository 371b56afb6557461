"""What holds each promise of the contract that is built by now: a file and its tests; each of them has to exist."""

import ast
import functools
from pathlib import Path

import pytest

COMMAND_LINE = """
flags, variables, help: cli test_help test_flags_and_variables test_bad_values
the model that a key, an address or nothing chooses: llm test_the_default_model; docs test_serve_commands; cli
  test_endpoint_without_a_choice
the first line names the address; signals close cleanly: cli test_serving; kill
  test_whatever_ends_a_server_a_turn_is_whole_and_never_runs_twice
one sentence, exit 2, no traceback: cli test_refusals test_missing_package; python_api test_what_is_held_is_named
chat: cli test_pipe test_interrupted_chat; chat test_conversation test_slash_commands
check, export, import, backup, beside a server: keeping test_damage test_an_imported_agent_is_the_exported_one
  test_beside_turns
former exports are read, a former database is refused: store test_a_former_export_is_read; cli test_refusals
record and replay: tape test_faults test_agents_at_once test_changed_prompts test_secrets test_files test_vectors
the file alone serves; two copies do not meet: cli test_copied_alone
the protocol as JSON Schema: wire test_the_protocol_is_that_of_the_contract
"""
PYTHON = """
start, stop, what is left: python_api test_start_and_stop test_stop_leaves_nothing_of_a_busy_server
  test_stop_names_a_tool_that_will_not_end
run, also in a cell: python_api test_run_blocks_until_interrupted test_run_inside_a_running_loop
start_server, initialize_server, handle_client: python_api test_start_server_serves_until_cancelled
  test_what_came_before_start_server test_handle_client_of_a_websockets_server_of_ones_own
create_new_agent, load_agent, run_step: python_api test_run_step_gives_the_turns_events
  test_the_agent_of_the_object_is_its_own test_only_python_names_an_endpoint
first_message, no_verify: agent test_a_first_message_has_to_be_sent
blocking calls from any thread, before start, not on the own loop: python_api test_blocking_calls_work_before_start
  test_blocking_calls_work_from_any_thread test_blocking_calls_are_refused_on_the_servers_own_loop
a cell that runs again, reload, a held port: python_api test_a_cell_that_runs_again_takes_over
  test_what_is_held_is_named
server.tool: tools test_the_decorator_registers_and_replaces
Client, connect: client test_ask test_blocking test_reconnect_resumes
memory_index: memory test_positions_are_the_turns test_any_turns_are_indexed
import needs websockets alone: counts test_importing_and_serving_needs_websockets_alone; cli test_copied_alone
"""
WIRE = """
healthz; other methods 405: gate test_plain_http
MemGPT 0.2.7's protocol: server test_the_flow_of_memgpt_0_2_7
no frame over 1 MiB; replies are cut at 100,000 characters: server test_a_long_reply_is_cut; wire
  test_an_event_is_its_frame; agent test_a_reply_without_end_is_cut
pages and too_large: server test_lists_hold_what_a_frame_can_hold test_an_answer_over_a_frame_is_too_large
  test_get_context_and_get_request_page_their_messages
requests are taken up in order, compact beside them: server test_a_flood_is_answered_and_others_are_served_in_between
  test_compact; embeddings
  test_a_search_waits_beside_its_session
id: server test_an_id_is_on_answers_starts_terminals_and_refusals; wire test_a_bad_id_is_refused
agent_name, agent_id: server test_naming_an_agent_does_not_switch test_without_an_agent_nothing_is_current
when_busy: machine test_whatever_clients_do
every command: wire test_the_protocol_is_that_of_the_contract test_schema_and_check_agree_on_every_field
create, load, config, names: server test_create_agent test_naming_an_agent_does_not_switch test_names_are_words
  test_create_agent_warns_of_what_it_ignores
hello, list, get, update: server test_hello_and_the_message_types test_hello_counts_what_each_model_needed
  test_list_agents_and_get_agent_tell_what_runs test_update_agent
rename, delete, restore, purge: machine test_whatever_clients_do; client test_rename_and_delete; store
  test_a_purged_agent_is_gone
messages and search: server test_get_messages_pages_backwards test_search_memory
blocks and passages: server test_edits_of_memory test_blocks_are_reshaped; tools test_core_memory_is_edited
wake, heartbeats: server test_timed_heartbeats; agent test_what_comes_of_an_answer
"""
BAD_INPUT = """
not JSON, no object, wrong types, too deep, huge numbers, NaN: wire test_hostile_frames_get_one_named_error
  test_depth_is_counted_exactly; server test_an_id_is_on_answers_starts_terminals_and_refusals; soak
  test_every_figure_is_met
at most 80 characters quoted, at most 4 KiB: wire test_no_error_quotes_more_than_80_characters; errors
  test_an_answer_to_any_error_fits_in_4_kib
lone surrogates, NUL: wire test_what_no_text_can_hold_is_read_as_u_fffd; python_api
  test_python_calls_refuse_what_the_wire_refuses
1007, 1002, 1009: server test_frames_in_fragments_and_of_the_largest_size; gate test_breaches_of_the_standard_close
a flood: server test_a_flood_is_answered_and_others_are_served_in_between
a taken name, a bad config, a text over a limit, an unknown agent: server test_names_are_words
  test_bad_configs_change_nothing test_edits_of_memory test_an_unknown_agent_is_told_with_the_nearest
a reader that does not read: soak test_every_figure_is_met
a foreign Origin or Host: gate test_hosts test_origins test_what_is_allowed_passes; soak test_every_figure_is_met
tokens: gate test_tokens test_with_a_token_addresses_are_right test_beyond_loopback_needs_a_token; python_api
  test_on_a_jupyterhub_a_token_is_made
connection number 4,097: gate test_one_connection_too_many_gets_503
"""
EVENTS = """
classic types in their order: server test_the_flow_of_memgpt_0_2_7; agent
  test_the_events_of_a_step_are_in_the_order_of_0_2_7
more types: server test_hello_and_the_message_types test_deltas_are_live
a turn: machine test_whatever_clients_do; kill test_whatever_ends_a_server_a_turn_is_whole_and_never_runs_twice
exactly one terminal frame, whatever befalls a reader: soak test_every_figure_is_met
a message that never becomes a turn: machine test_whatever_clients_do
seq: store test_a_purged_agent_is_gone; machine test_whatever_clients_do; soak test_every_figure_is_met
a step is one transaction, then told: counts test_commits_of_a_turn; agent test_a_store_that_fails_around_a_tool;
  soak test_every_figure_is_met
who gets what: server test_a_command_of_a_client_that_leaves_is_done_wholly; machine test_whatever_clients_do
a turn_id sent again: server test_a_running_turn_sent_again; machine
  test_whatever_clients_do; soak test_every_figure_is_met
a crash: kill test_whatever_ends_a_server_a_turn_is_whole_and_never_runs_twice
  test_a_repair_is_made_once_and_before_all_else; soak test_every_figure_is_met
subscribe: server test_what_cannot_be_read_is_read_later; machine test_whatever_clients_do
turns never overlap, agents never wait for each other: server test_a_blocking_tool_stops_nobody; machine
  test_whatever_clients_do
"""
AGENT = """
1 history is never poisoned: misbehaviour test_whatever_happens_talk_goes_on; agent
  test_a_broken_history_is_mended_and_told test_a_store_that_fails_around_a_tool
2 compaction: agent test_a_long_conversation_in_a_small_window test_the_agent_is_warned_once_before_the_window_is_full
  test_an_overflow_that_only_the_endpoint_sees test_an_endpoint_that_cuts_prompts_silently_is_noticed
3 a turn ends: agent test_what_comes_of_an_answer test_a_failing_turn_makes_at_most_eight_calls
4 cancel: agent test_cancel_while_the_model_answers test_cancel_in_a_tool test_cancel_between_two_waits; misbehaviour
  test_whatever_happens_talk_goes_on
5 the ladder; half an answer: agent test_what_comes_of_an_answer; llm test_what_is_read_of_a_reply
6 nothing sent is executed: layers test_memws; tools test_conversation_search_pages_through_the_past
7 the prompt only grows at its end: agent test_the_prompt_only_grows_at_its_end
  test_the_system_message_is_rebuilt_by_an_edit_a_load_and_a_compaction test_messages_are_packed_as_0_2_7_packed_them
  test_a_login_precedes_a_message_after_an_hour_of_silence; tools test_what_tools_returned_is_no_recall_memory
days and times of the agent's timezone: tools test_days_are_the_agents; server test_an_agent_keeps_its_timezone
  test_search_memory; cli test_flags_and_variables
8 token counts: agent test_estimates_are_calibrated_within_bounds
9 roles and ids that endpoints take: llm test_names_and_ids_that_no_api_takes_are_changed
  test_an_option_that_is_refused; agent test_what_an_endpoint_wants_is_learned_once test_what_a_refusal_teaches
  test_only_its_maker_gets_back_what_it_made; server test_what_is_learned_outlives_a_restart
one search for every script and any query: memory test_every_script_is_found test_hostile_queries_over_hostile_texts
embeddings: embeddings test_what_shares_no_word_is_found test_without_a_model_nothing_is_embedded
  test_turns_and_searches_go_on_without_vectors
"""
CODES = """
not_json, not_object, bad_type, missing_field, too_deep, unknown_command: wire test_hostile_frames_get_one_named_error
bad_field, bad_config, block_limit: server test_bad_configs_change_nothing
no_agent: server test_without_an_agent_nothing_is_current
unknown_agent: server test_an_unknown_agent_is_told_with_the_nearest
name_taken: server test_names_are_words
text_too_long: server test_frames_in_fragments_and_of_the_largest_size; python_api
  test_python_calls_refuse_what_the_wire_refuses
turn_id_reused: machine test_whatever_clients_do
too_large: server test_an_answer_over_a_frame_is_too_large
busy: machine test_whatever_clients_do
conflict, not_found: server test_edits_of_memory
unknown_turn, cancelled: machine test_whatever_clients_do
unknown_seq: machine test_whatever_clients_do
store_failed: server test_a_message_that_cannot_be_stored_is_refused
internal: errors test_codes_and_sentences_are_those_of_the_contract; agent test_a_fault_of_ours_ends_its_turn_alone
queue_full: machine test_whatever_clients_do
model_auth, model_refused, context_overflow, model_rate_limit, model_timeout, model_unavailable: llm
  test_a_failure_has_its_code
bad_output: agent test_what_comes_of_an_answer
"""
TABLES = (COMMAND_LINE, PYTHON, WIRE, BAD_INPUT, EVENTS, AGENT, CODES)
LINES = [line for line in "".join(TABLES).replace("\n  ", " ").splitlines() if line]
PARTS = [part.split() for line in LINES for part in line.rpartition(": ")[2].split("; ")]
NAMED = sorted({(file, test) for file, *tests in PARTS for test in tests})


@functools.cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((Path(__file__).parent / f"test_{file}.py").read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_what_the_tables_name_exists(file: str, test: str) -> None:
    assert test in names_in(file)


def test_every_line_names_a_test() -> None:
    """A promise without a test is no line of a table."""
    assert [line for line in LINES if " test_" not in line.rpartition(": ")[2]] == []
    assert len(NAMED) > 130
