//! What happens when things go wrong: nothing leaks, nothing established is lost, everything comes back.
//!
//! One lab; the trials run in order, each leaves the lab as it found it.
#![allow(
    clippy::print_stderr,
    reason = "what a destructor cannot return is told where the trial's is"
)]

mod agent;
mod direct;
mod enrolment;
mod hostile;
mod mesh;
mod policy;
mod services;
mod watch;

use mesh_netns::trials::{self, Named};

use crate::mesh::Mesh;

const FAULTS: &[Named<Mesh>] = &[
    ("the_watch_sees_what_a_plain_pod_says", watch::sees_a_plain_pod),
    ("dead_agent_refuses_and_nothing_leaks", agent::dead_refuses_and_nothing_leaks),
    ("restarts_under_traffic_never_leak", agent::restarts_under_traffic_never_leak),
    ("pod_does_not_start_without_an_agent", agent::pod_does_not_start_without_one),
    ("container_runtime_checks_and_collects", agent::runtime_checks_and_collects),
    ("controller_away_changes_nothing", agent::controller_away_changes_nothing),
    ("keys_outlive_an_agent_while_the_controller_is_away", agent::keys_outlive_an_agent),
    ("pod_cannot_take_the_agents_ports", agent::pod_cannot_take_its_ports),
    ("raw_packets_of_a_pod_do_not_leave", hostile::raw_packets_do_not_leave),
    ("pod_that_undoes_its_own_network_does_not_leak", hostile::vandal_does_not_leak),
    ("attacks_find_no_gap_while_things_change", hostile::attacks_find_no_gap),
    ("live_connections_never_notice_enrolment", enrolment::live_connections_never_notice),
    ("enrolling_and_unenrolling_under_traffic", enrolment::in_and_out_under_traffic),
    ("a_captured_namespace_is_not_let_go_by_another", enrolment::another_netns_lets_none_go),
    ("a_deleted_pod_stays_captured_until_it_is_gone", enrolment::deleted_stays_captured),
    ("denying_policy_cuts_live_connections", policy::denying_cuts_live_connections),
    (
        "denying_cuts_connections_without_a_tunnel",
        policy::denying_cuts_connections_without_a_tunnel,
    ),
    ("direct_second_connection_of_a_pair", direct::second_connection_goes_directly),
    ("direct_and_delivered_connections", direct::delivered_and_direct_ones_never_meet),
    ("direct_services", services::services_go_directly),
    ("direct_services_and_the_agent", services::the_agent_takes_services_back),
    ("direct_connections_are_cut_by_a_policy", direct::denying_cuts_direct_connections),
    ("direct_connections_outlive_the_agent", direct::killed_agent_leaves_direct_connections),
    ("direct_connections_end_with_a_waypoint", direct::waypoint_ends_direct_connections),
    ("direct_address_given_again", direct::address_given_again),
    ("direct_unenrolled_pod", direct::unenrolled_pod_takes_no_part),
    ("direct_connections_outlive_membership", direct::pods_that_leave_keep_direct_connections),
    ("direct_path_and_labels", direct::labels_keep_pods_in_tunnels),
    ("direct_connections_are_handed_over", direct::hand_over_keeps_direct_connections),
    ("direct_connections_end_with_the_setting", direct::setting_ends_direct_connections),
];

fn main() -> anyhow::Result<()> {
    trials::run(Mesh::start, FAULTS, |mesh| {
        let log = |node| mesh.lab.node(node).agent_log(20);
        format!("--- a\n{}\n--- b\n{}", log("a"), log("b"))
    })
}
