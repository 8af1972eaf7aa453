//! The API server, asked without a program for each request: for tests that have thousands.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use http::{Method, Request};
use picomesh::k8s::client::{self, Client};
use picomesh_tests::cluster::Kubectl;
use serde_json::Value;
use tokio::runtime::Runtime;

/// One request to the API server.
#[derive(Clone)]
pub(crate) struct Call {
    method: Method,
    path: String,
    body: Vec<u8>,
}

impl Call {
    pub(crate) fn post(path: String, body: &Value) -> Self {
        let body = body.to_string().into();
        Self {
            method: Method::POST,
            path,
            body,
        }
    }

    /// What stands there and is not named stays.
    pub(crate) fn patch(path: String, body: &Value) -> Self {
        Self {
            method: Method::PATCH,
            ..Self::post(path, body)
        }
    }

    pub(crate) fn get(path: String) -> Self {
        Self {
            method: Method::GET,
            ..Self::delete(path)
        }
    }

    pub(crate) fn delete(path: String) -> Self {
        Self {
            method: Method::DELETE,
            path,
            body: Vec::new(),
        }
    }

    async fn send(&self, client: &Client) -> Result<String> {
        let content = if self.method == Method::PATCH {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let request = Request::builder()
            .method(&self.method)
            .uri(&self.path)
            .header("content-type", content)
            .body(self.body.clone())?;
        let sent = client.request_text(request).await;
        sent.with_context(|| format!("{} {}", self.method, self.path))
    }
}

/// With the rights that kubectl has.
pub(crate) struct Api {
    runtime: Runtime,
    client: Client,
}

impl Api {
    /// Requests under way at once.
    const AT_ONCE: usize = 16;

    pub(crate) fn new(kubectl: &Kubectl) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let kubeconfig = kubectl.kubeconfig().to_owned();
        let client = runtime.block_on(client::connect(Some(kubeconfig)))?;
        Ok(Self { runtime, client })
    }

    pub(crate) fn call(&self, call: &Call) -> Result<String> {
        self.runtime.block_on(call.send(&self.client))
    }

    /// In any order. The first failure ends it.
    pub(crate) fn all(&self, calls: impl Iterator<Item = Call> + Send + 'static) -> Result<()> {
        let calls = Arc::new(Mutex::new(calls));
        let one_by_one = || {
            let (client, calls) = (self.client.clone(), Arc::clone(&calls));
            async move {
                loop {
                    let next = calls.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(call) = next else { return Ok(()) };
                    call.send(&client).await?;
                }
            }
        };
        let senders = (0..Self::AT_ONCE).map(|_| self.runtime.spawn(one_by_one()));
        let senders: Vec<_> = senders.collect();
        let mut all = Ok(());
        for sender in senders {
            all = all.and(self.runtime.block_on(sender)?);
        }
        all
    }

    /// How many objects a collection has.
    pub(crate) fn count(&self, collection: &str) -> Result<u64> {
        let first = self.call(&Call::get(format!("{collection}?limit=1")))?;
        let first: Value = serde_json::from_str(&first)?;
        let shown = first["items"].as_array().map_or(0, Vec::len) as u64;
        Ok(shown
            + first["metadata"]["remainingItemCount"]
                .as_u64()
                .unwrap_or(0))
    }
}
