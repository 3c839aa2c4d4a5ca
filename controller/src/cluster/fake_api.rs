//! An API server in memory, as far as the parts beside it need one: objects by path, resource versions, `status`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use http::{Method, Request, Response, StatusCode};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;

type Answer = Arc<dyn Fn(&Value) -> Value + Send + Sync>;

/// The server.
#[derive(Clone, Default)]
pub(crate) struct FakeApi {
    objects: Arc<Mutex<Objects>>,
    /// A path at which everything that is created is answered, and not kept.
    answer: Option<(String, Answer)>,
}

type Meddling = dyn FnOnce(&mut BTreeMap<String, Value>) + Send;

#[derive(Default)]
struct Objects {
    by_path: BTreeMap<String, Value>,
    version: u64,
    /// What is done by others before the next change is looked at.
    meddling: Option<Box<Meddling>>,
}

impl FakeApi {
    /// One that answers creations at `path`.
    pub(crate) fn answering(
        path: &str,
        answer: impl Fn(&Value) -> Value + Send + Sync + 'static,
    ) -> Self {
        Self { answer: Some((path.to_owned(), Arc::new(answer))), ..Self::default() }
    }

    /// A client of it.
    pub(crate) fn client(&self) -> Client {
        let api = self.clone();
        let serve = service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move {
                let (head, body) = request.into_parts();
                let bytes = body.collect_bytes().await.expect("a body in memory");
                let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
                tokio::task::yield_now().await;
                let (status, answer) = api.serve(&head.method, head.uri.path(), body);
                let answer = Body::from(answer.to_string().into_bytes());
                let answer = Response::builder().status(status).body(answer);
                Ok::<_, Infallible>(answer.expect("a response"))
            }
        });
        Client::new(serve, "default")
    }

    /// Puts an object there, or takes it away, as somebody else.
    pub(crate) fn put(&self, path: &str, object: Option<Value>) {
        let mut objects = self.objects();
        match object {
            Some(object) => drop(objects.keep(path, object)),
            None => drop(objects.by_path.remove(path)),
        }
    }

    /// The object at a path.
    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.objects().by_path.get(path).cloned()
    }

    /// Every object whose path begins so.
    pub(crate) fn below(&self, prefix: &str) -> Vec<Value> {
        let objects = self.objects();
        let found = objects.by_path.iter().filter(|(path, _)| path.starts_with(prefix));
        found.map(|(_, object)| object.clone()).collect()
    }

    /// Changes objects as somebody else, right before the next change from here.
    pub(crate) fn meddle(&self, path: &str, object: Value) {
        let path = path.to_owned();
        self.objects().meddling = Some(Box::new(move |objects| {
            let mut object = object;
            object["metadata"]["resourceVersion"] = json!("meddled");
            objects.insert(path, object);
        }));
    }

    fn objects(&self) -> std::sync::MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, method: &Method, path: &str, body: Value) -> (StatusCode, Value) {
        if let Some((at, answer)) = &self.answer
            && at == path
        {
            return (StatusCode::CREATED, answer(&body));
        }
        let mut objects = self.objects();
        if *method != Method::GET
            && let Some(meddling) = objects.meddling.take()
        {
            meddling(&mut objects.by_path);
        }
        let (path, is_status) = match path.strip_suffix("/status") {
            Some(path) => (path, true),
            None => (path, false),
        };
        let found = objects.by_path.get(path).cloned();
        match (method.as_str(), found) {
            ("GET", Some(object)) => (StatusCode::OK, object),
            ("POST", _) => {
                let name = body["metadata"]["name"].as_str().unwrap_or_default();
                let path = format!("{path}/{name}");
                if objects.by_path.contains_key(&path) {
                    return failure(StatusCode::CONFLICT, "AlreadyExists");
                }
                (StatusCode::CREATED, objects.keep(&path, body))
            }
            ("PUT", Some(object)) => {
                let told = &body["metadata"]["resourceVersion"];
                if told.is_string() && *told != object["metadata"]["resourceVersion"] {
                    return failure(StatusCode::CONFLICT, "Conflict");
                }
                let mut next = if is_status { object } else { body.clone() };
                if is_status {
                    next["status"] = body["status"].clone();
                }
                (StatusCode::OK, objects.keep(path, next))
            }
            ("PATCH", Some(mut object)) => {
                merge(&mut object, body);
                (StatusCode::OK, objects.keep(path, object))
            }
            // What is applied is made when there is none.
            ("PATCH", None) if body["apiVersion"].is_string() => {
                (StatusCode::CREATED, objects.keep(path, body))
            }
            (_, _) => failure(StatusCode::NOT_FOUND, "NotFound"),
        }
    }
}

impl Objects {
    fn keep(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.by_path.insert(path.to_owned(), object.clone());
        object
    }
}

fn merge(into: &mut Value, patch: Value) {
    let Value::Object(fields) = patch else {
        *into = patch;
        return;
    };
    for (key, value) in fields {
        merge(&mut into[key], value);
    }
}

fn failure(code: StatusCode, reason: &str) -> (StatusCode, Value) {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "metadata": {},
        "message": reason, "reason": reason, "code": code.as_u16(),
    });
    (code, status)
}
