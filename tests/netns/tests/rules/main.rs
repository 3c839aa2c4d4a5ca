//! What the mesh decides: policy, identity, names, and the objects it is told. Every refusal is one with a reason.
//!
//! One lab; the trials run in order, each leaves the lab as it found it.
#![allow(clippy::print_stderr, reason = "a helper thread's failure is told where the trial's is")]

mod annotations;
mod authority;
mod capture;
mod churn;
mod destinations;
mod dns;
mod identity;
mod manifests;
mod mesh;
mod networks;
mod policy;
mod pressure;
mod routing;
mod standin;
mod telemetry;
mod tls;
mod traffic;

use mesh_netns::trials::{self, Named};

use crate::mesh::Mesh;

const STEPS: &[Named<Mesh>] = &[
    ("policy::deny_by_principal", policy::deny_by_principal),
    ("policy::allow_that_does_not_match", policy::allow_that_does_not_match),
    ("policy::deny_by_namespace", policy::deny_by_namespace),
    ("policy::deny_by_ip_block", policy::deny_by_ip_block),
    ("policy::deny_by_port", policy::deny_by_port),
    ("policy::l7_only_allow", policy::l7_only_allow),
    ("policy::strict_for_the_mesh", policy::strict_for_the_mesh),
    ("policy::strict_for_a_namespace", policy::strict_for_a_namespace),
    ("policy::strict_for_a_workload", policy::strict_for_a_workload),
    ("policy::strict_for_a_port", policy::strict_for_a_port),
    ("policy::modes_of_ports", policy::modes_of_ports),
    ("policy::deny_by_what_is_not", policy::deny_by_what_is_not),
    ("policy::deny_by_condition", policy::deny_by_condition),
    ("policy::deny_in_the_root_namespace", policy::deny_in_the_root_namespace),
    ("policy::unknown_egress", policy::unknown_egress),
    ("policy::dry_run_is_noted_only", policy::dry_run_is_noted_only),
    ("policy::audit_is_noted_only", policy::audit_is_noted_only),
    ("routing::addresses_of_a_service", routing::service_addresses),
    ("routing::loopback_is_not_reached_from_outside", routing::loopback_only),
    ("routing::mapped_addresses", routing::mapped_addresses),
    ("churn::label_taken_away_keeps_connections", churn::label_taken_away),
    ("traffic::replicas_count_as_one", traffic::replicas_count_as_one),
    ("traffic::both_ends_of_one_node", traffic::both_ends_of_one_node),
    ("traffic::what_agents_count_of_themselves", traffic::what_agents_count_of_themselves),
    ("annotations::inbound_lists", annotations::inbound_lists),
    ("annotations::outbound_networks", annotations::outbound_networks),
    ("annotations::denied_protocols", annotations::denied_protocols),
    ("capture::excluded_outbound_ports", capture::excluded_outbound_ports),
    ("telemetry::istios_labels", telemetry::istios_labels),
    ("telemetry::scrapes_are_compressed", telemetry::scrapes_are_compressed),
    ("telemetry::memory", telemetry::memory),
    ("identity::certificates", identity::certificates),
    ("standin::wrong_servers_are_refused", standin::wrong_servers_are_refused),
    ("identity::server_of_another_name", identity::server_of_another_name),
    ("identity::requests", identity::requests),
    ("identity::signing_and_tokens", identity::signing_and_tokens),
    ("pressure::ended_certificate", pressure::ended_certificate),
    ("pressure::silent_flood", pressure::silent_flood),
    ("dns::names_of_the_mesh", dns::names_of_the_mesh),
    ("dns::search_domains", dns::search_domains),
    ("dns::service_entry_is_reached_by_name", dns::service_entry_is_reached_by_name),
    ("dns::other_names_are_forwarded", dns::other_names_are_forwarded),
    ("dns::names_of_the_clusters_own_dns", dns::names_of_the_clusters_own_dns),
    ("dns::what_is_forwarded_is_whole", dns::what_is_forwarded_is_whole),
    ("dns::client_that_asks_no_more", dns::client_that_asks_no_more),
    ("dns::pod_that_keeps_its_own_names", dns::pod_that_keeps_its_own_names),
    ("dns::resolver_that_is_not_there", dns::resolver_that_is_not_there),
    ("dns::names_of_pods", dns::names_of_pods),
    ("dns::answers_are_kept_no_longer_than_their_ttl", dns::answers_are_kept_for_their_ttl),
    ("destinations::by_their_names", destinations::by_their_names),
    ("destinations::ranges", destinations::ranges),
    ("destinations::workload_entries", destinations::workload_entries),
    ("destinations::of_one_namespace", destinations::of_one_namespace),
    ("destinations::on_the_hosts_network", destinations::on_the_hosts_network),
    ("destinations::link_local", destinations::link_local),
    ("destinations::endpoints_of_a_service", destinations::endpoints_of_a_service),
    ("manifests::refused_object_leaves_the_last_good_one", manifests::refused_object),
    ("manifests::unreadable_policy_refuses_whom_it_selects", manifests::unreadable_policy),
    ("manifests::last_good_policy_over_a_restart", manifests::last_good_policy_over_a_restart),
    ("networks::through_a_gateway", networks::through_a_gateway),
    ("churn::address_given_again", churn::address_given_again),
    ("churn::two_thousand_pods", churn::two_thousand_pods),
    ("authority::root_rotates_under_traffic", authority::root_rotates_under_traffic),
    ("authority::revocation_cuts_live_connections", authority::revocation_cuts),
    ("authority::revoked_server_is_cut_and_certified_anew", authority::revoked_server),
    ("authority::revoked_intermediate_is_replaced_at_once", authority::revoked_intermediate),
    ("authority::leaves_renew_until_the_old_roots_end", authority::to_the_old_roots_end),
];

fn main() -> anyhow::Result<()> {
    trials::run(Mesh::start, STEPS, |mesh| {
        let log = |node| mesh.lab.node(node).agent_log(12);
        format!("--- a\n{}\n--- b\n{}", log("a"), log("b"))
    })
}
