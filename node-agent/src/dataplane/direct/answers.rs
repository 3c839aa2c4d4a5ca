//! What was judged on the picture of now, remembered until there is another one.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_direct::{Judge, Judgement, Pair, Vip};

use super::State;
use super::judge::{Certificates, Ground, Judged, LocalPods, Sides, judge};
use super::spread::{Spreading, by_service, has_endpoint_here, spread};
use crate::dataplane::shared::{Shared, Snapshot};

/// Answers on one picture.
#[derive(Default)]
pub(super) struct Answers {
    picture: Option<Arc<Snapshot>>,
    judged: HashMap<Pair, Arc<Judged>>,
    spreadings: HashMap<Vip, Arc<Spreading>>,
    /// What is said of connections of a pair that were dialled by a virtual address.
    by_service: HashMap<(Pair, SocketAddr), Arc<Sides>>,
    certificates: Certificates,
}

impl Answers {
    pub(super) fn forget(&mut self) {
        self.forget_pods();
        self.certificates.forget();
    }

    /// Forgets what was said on other pods.
    pub(super) fn forget_pods(&mut self) {
        self.judged.clear();
        self.spreadings.clear();
        self.by_service.clear();
    }
}

/// Answers, and what they are drawn from.
pub(super) struct Bench<'b> {
    pub(super) answers: &'b mut Answers,
    pub(super) shared: &'b Shared,
    pub(super) state: &'b State,
    pub(super) pods: &'b LocalPods,
}

impl Bench<'_> {
    pub(super) fn ask(&mut self, pair: &Pair) -> Arc<Judged> {
        self.look();
        if let Some(judged) = self.answers.judged.get(pair) {
            return Arc::clone(judged);
        }
        let judged = Arc::new(self.on_ground(|ground| judge(ground, pair)));
        keep(&mut self.answers.judged, *pair, &judged);
        judged
    }

    pub(super) fn ask_vip(&mut self, vip: &Vip) -> Arc<Spreading> {
        self.look();
        if let Some(spreading) = self.answers.spreadings.get(vip) {
            return Arc::clone(spreading);
        }
        let spreading = Arc::new(self.on_ground(|ground| spread(ground, vip)));
        keep(&mut self.answers.spreadings, *vip, &spreading);
        spreading
    }

    pub(super) fn sides(&mut self, pair: &Pair, vip: SocketAddr) -> Arc<Sides> {
        let judged = self.ask(pair);
        if let Some(sides) = self.answers.by_service.get(&(*pair, vip)) {
            return Arc::clone(sides);
        }
        let sides = self.on_ground(|ground| by_service(ground, pair, vip, &judged.sides));
        keep(&mut self.answers.by_service, (*pair, vip), &sides);
        sides
    }

    pub(super) fn has_endpoint_here(&mut self, vip: &Vip) -> bool {
        self.look();
        self.on_ground(|ground| has_endpoint_here(ground, vip))
    }

    /// Forgets answers on another picture than that of now.
    fn look(&mut self) {
        let picture = self.shared.snapshot.load_full();
        if !self.answers.picture.as_ref().is_some_and(|known| Arc::ptr_eq(known, &picture)) {
            self.answers.forget_pods();
            self.answers.picture = Some(picture);
        }
    }

    fn on_ground<T>(&mut self, work: impl FnOnce(&mut Ground<'_>) -> T) -> T {
        let Answers { picture, certificates, .. } = &mut *self.answers;
        let snapshot = picture.get_or_insert_with(|| self.shared.snapshot.load_full());
        work(&mut Ground {
            same_node: self.state.in_effect(),
            snapshot,
            pods: self.pods,
            certificates,
            wall: SystemTime::now(),
        })
    }
}

impl Judge for Bench<'_> {
    fn pair(&mut self, pair: &Pair) -> Judgement {
        self.ask(pair).judgement
    }

    fn vip(&mut self, vip: &Vip) -> Option<Vec<Pair>> {
        (*self.ask_vip(vip)).clone().ok()
    }
}

/// What is only asked about must not pile up.
fn keep<K: Hash + Eq, V>(answers: &mut HashMap<K, Arc<V>>, key: K, answer: &Arc<V>) {
    if answers.len() >= MAX_ANSWERS {
        answers.clear();
    }
    answers.insert(key, Arc::clone(answer));
}

const MAX_ANSWERS: usize = 65_536;
