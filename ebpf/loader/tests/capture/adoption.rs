//! Capture outlives the process that loaded it, and its programs are replaced without a gap.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use mesh_ebpf::{Capture, CaptureError, CgroupOrder, GuardAttachment, PodSettings};

use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Lab, OUTSIDE_V4, OUTSIDE_V6, POD_V4, at, borrow, dial, greet, ip, listener, read_line, refused,
    run,
};

#[test]
fn what_is_pinned_captures_without_a_process_and_is_adopted() {
    let lab = Lab::new();
    let capture = lab.capture();
    assert!(!capture.features().adopted);
    assert_ne!(capture.features().cgroup_order, CgroupOrder::Adopted);
    let agent = lab.enroll(&capture, PodSettings::default());
    let cookie = agent.cookie;
    lab.pod.inside(|| {
        assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), format!("outbound {OUTSIDE_V4}:80"));
    });
    // All descriptors of the loader close, as they do when the process dies.
    drop(agent);
    drop(Arc::into_inner(capture));
    lab.pod.inside(|| {
        for _ in 0..50 {
            assert!(refused(&dial(at(OUTSIDE_V4, 80))));
            assert!(refused(&dial(at(OUTSIDE_V6, 80))));
        }
    });
    lab.outside.inside(|| assert!(refused(&dial(at(POD_V4, 80)))));

    let capture = lab.capture();
    assert!(capture.features().adopted);
    assert_eq!(capture.features().cgroup_order, CgroupOrder::Adopted);
    let enrolled = capture.enrolled().unwrap();
    assert_eq!(enrolled.len(), 1);
    assert_eq!(enrolled[0].cookie, cookie);
    assert_eq!(enrolled[0].addresses, [ip(POD_V4), ip("fd91:1::2")]);
    assert_eq!((enrolled[0].guarded.len(), enrolled[0].steered), (1, true));
    let _agent = lab.agent(&capture);
    lab.pod.inside(|| {
        assert_eq!(dial(at(OUTSIDE_V6, 80)).unwrap(), format!("outbound [{OUTSIDE_V6}]:80"));
    });
    lab.outside.inside(|| {
        assert_eq!(dial(at(POD_V4, 80)).unwrap(), format!("inbound {POD_V4}:80"));
    });
    capture.detach_all().unwrap();
    assert_eq!(std::fs::read_dir(lab.bpffs.join("culvert")).unwrap().count(), 0);
    lab.pod.inside(|| assert!(refused(&dial(at(OUTSIDE_V4, 80)))));
}

/// A run on another kernel says what that kernel has, so that its fallback is what was tested.
#[test]
fn the_guard_is_attached_as_the_kernel_allows() {
    let lab = Lab::new();
    let found = lab.capture().features().guard;
    match std::env::var("CULVERT_EXPECTED_GUARD").as_deref() {
        Ok("tcx") => assert_eq!(found, GuardAttachment::Tcx),
        Ok("clsact") => assert_eq!(found, GuardAttachment::Clsact),
        Ok(other) => panic!("CULVERT_EXPECTED_GUARD={other}"),
        Err(_) => {}
    }
}

#[test]
fn programs_are_replaced_under_load_without_a_failure() {
    let lab = Lab::new();
    let capture = lab.capture();
    let _agent = lab.enroll(&capture, PodSettings::default());
    let (stop, done) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            lab.pod.inside(|| {
                while !stop.load(Ordering::Relaxed) {
                    let target = at(OUTSIDE_V4, 80);
                    assert_eq!(dial(target).unwrap(), format!("outbound {target}"));
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        });
        scope.spawn(|| {
            lab.outside.inside(|| {
                while !stop.load(Ordering::Relaxed) {
                    let target = at(POD_V4, 80);
                    assert_eq!(dial(target).unwrap(), format!("inbound {target}"));
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        });
        for _ in 0..5 {
            let before = done.load(Ordering::Relaxed);
            lab.capture();
            while done.load(Ordering::Relaxed) < before + 50 {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(capture.counters().unwrap()["guard_dropped_no_flow"], 0);
}

#[test]
fn a_pinned_map_of_another_shape_is_refused() {
    let lab = Lab::new();
    drop(lab.capture());
    // The layout's number stays, the shape does not: one map in another's place.
    let maps = lab.bpffs.join("culvert/v3/maps");
    run(&format!("cd {} && mv PODS OTHER && mv ADDRESSES PODS", maps.display()));
    let error = Capture::load_or_adopt(&lab.config()).unwrap_err();
    assert!(matches!(error, CaptureError::IncompatiblePin { map: "PODS", .. }), "{error}");
}

#[test]
fn another_layout_is_found_and_removed() {
    let lab = Lab::new();
    let capture = lab.capture();
    assert!(capture.foreign_layouts().unwrap().is_empty());
    std::fs::create_dir_all(lab.bpffs.join("culvert/v999/links")).unwrap();
    assert_eq!(capture.foreign_layouts().unwrap(), [999]);
    capture.remove_foreign_layouts().unwrap();
    assert!(capture.foreign_layouts().unwrap().is_empty());
}

/// An upgrade to a build whose maps have other shapes: the old capture stays attached, and refuses whatever bears no label
/// of its own, until the pod is captured by the new one. Nothing leaves in the meantime.
#[test]
fn a_pod_of_another_layout_is_taken_over_without_a_gap() {
    let lab = Lab::new();
    let outside = lab.outside.inside(|| listener(80));
    greet(&outside, |_, _| "in the clear".to_owned());
    let old = Arc::new(Capture::load_layout(&lab.config(), 998).unwrap());
    let agent = lab.enroll(&old, PodSettings::default());
    let cookie = agent.cookie;
    lab.pod.inside(|| {
        assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), format!("outbound {OUTSIDE_V4}:80"));
    });
    // The old agent's process ends.
    drop(agent);
    drop(Arc::into_inner(old));
    let (stop, refusals) = (AtomicBool::new(false), AtomicU32::new(0));
    let capture = std::thread::scope(|scope| {
        scope.spawn(|| {
            lab.pod.inside(|| {
                while !stop.load(Ordering::Relaxed) {
                    let answer = dial(at(OUTSIDE_V4, 80));
                    assert_ne!(answer.as_deref().ok(), Some("in the clear"));
                    refusals.fetch_add(u32::from(answer.is_err()), Ordering::Relaxed);
                }
            });
        });
        // Ends the thread also when an assertion fails.
        let _stop = StopOnDrop(&stop);
        let capture = lab.capture();
        assert_eq!(capture.foreign_layouts().unwrap(), [998]);
        assert_eq!(capture.foreign_pods().unwrap(), [cookie]);
        assert_eq!(capture.retire_foreign_layouts().unwrap(), [998], "it captures a pod");
        // What the new agent dials in the pod is not sent back to it.
        lab.pod.inside(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
            capture.label(borrow(&socket)).unwrap();
            socket.connect(&at(OUTSIDE_V4, 80).into()).unwrap();
            assert_eq!(read_line(&socket.into()).unwrap(), "in the clear");
        });
        // Its listeners may take the agent's ports, which the old capture guards.
        let agent = lab.enroll(&capture, PodSettings::default());
        assert!(capture.foreign_pods().unwrap().is_empty());
        lab.pod.inside(|| {
            assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), format!("outbound {OUTSIDE_V4}:80"));
        });
        lab.outside.inside(|| {
            assert_eq!(dial(at(POD_V4, 80)).unwrap(), format!("inbound {POD_V4}:80"));
        });
        assert!(capture.retire_foreign_layouts().unwrap().is_empty());
        assert!(capture.foreign_layouts().unwrap().is_empty());
        lab.pod.inside(|| {
            assert_eq!(dial(at(OUTSIDE_V6, 80)).unwrap(), format!("outbound [{OUTSIDE_V6}]:80"));
        });
        drop(agent);
        capture
    });
    assert!(refusals.load(Ordering::Relaxed) > 0, "closed while nobody served");
    capture.detach_all().unwrap();
}

/// A pod that leaves the mesh before it was captured anew is not left to an old layout for ever.
#[test]
fn unenrolling_frees_a_pod_of_another_layout() {
    let lab = Lab::new();
    let outside = lab.outside.inside(|| listener(80));
    greet(&outside, |_, _| "in the clear".to_owned());
    let old = Arc::new(Capture::load_layout(&lab.config(), 998).unwrap());
    let cookie = lab.enroll(&old, PodSettings::default()).cookie;
    drop(Arc::into_inner(old));
    let capture = lab.capture();
    lab.pod.inside(|| assert!(refused(&dial(at(OUTSIDE_V4, 80)))));
    capture.unenroll(cookie).unwrap();
    lab.pod.inside(|| assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), "in the clear"));
    assert!(capture.retire_foreign_layouts().unwrap().is_empty());
    capture.detach_all().unwrap();
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_guard_comes_back_when_it_was_removed() {
    let lab = Lab::new();
    for preference in [mesh_ebpf::GuardPreference::Auto, mesh_ebpf::GuardPreference::Clsact] {
        let config = mesh_ebpf::CaptureConfig { guard: preference, ..lab.config() };
        let capture = Arc::new(Capture::load_or_adopt(&config).unwrap());
        let agent = lab.enroll(&capture, PodSettings::default());
        assert_eq!(capture.verify_guards().unwrap(), 0);
        if capture.features().guard == GuardAttachment::Clsact {
            run("tc qdisc del dev vpod clsact");
        } else {
            let pod = lab.bpffs.join(format!("culvert/v3/pods/{}", agent.cookie));
            run(&format!("rm {}/guard_*", pod.display()));
        }
        assert_eq!(capture.verify_guards().unwrap(), 1);
        assert_eq!(capture.verify_guards().unwrap(), 0);
        capture.detach_all().unwrap();
    }
}
