//! The OpenAPI 3.1 document of the API, from the table of routes and the types.

use super::{
    routes::{Answer, Method, ROUTES, Recorded, Route, SchemaOf},
    types::{API_HEADER, API_VERSION, ApiError},
};
use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

/// The document.
pub fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let operation = operation(route, &mut generator);
        let method = match route.method {
            Method::Get => "get",
            Method::Post => "post",
        };
        paths.insert(route.path.into(), json!({ method: operation }));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "laird",
            "version": API_VERSION.to_string(),
            "description": format!(
                "The supervisor of a Lair host, over its unix socket. Who calls is told by the kernel. One request for each connection. \
                 Each side says its version of this API in the header `{API_HEADER}`."
            ),
        },
        "paths": paths,
        "components": { "schemas": generator.take_definitions(true) },
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let role = route.role.map_or("none: whoever may connect".into(), |role| format!("`{}`", role.word()));
    let recorded = match route.recorded {
        Recorded::All => "each attempt",
        Recorded::Refusals => "refusals",
    };
    let mut parameters = Vec::new();
    let names = route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    parameters.extend(names.map(|name| {
        let schema = json!({ "type": "string" });
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    }));
    parameters.extend(route.query.into_iter().flat_map(|query| query_parameters(query, generator)));
    let (media_type, schema) = match route.answer {
        Answer::Json(schema) => ("application/json", schema(generator).to_value()),
        Answer::Lines(schema) => ("application/jsonl", schema(generator).to_value()),
        Answer::Text(media_type) => (media_type, json!({})),
    };
    let lines = if matches!(route.answer, Answer::Lines(_)) { "; one such object a line" } else { "" };
    let error = generator.subschema_for::<ApiError>();
    let mut operation = json!({
        "summary": route.about,
        "description": format!("Role: {role}. The audit log has {recorded}."),
        "responses": {
            "200": { "description": format!("Done{lines}"), "content": { media_type: { "schema": schema } } },
            "default": {
                "description": "Not done, and nothing has changed",
                "content": { "application/json": { "schema": error } },
            },
        },
    });
    let Some(fields) = operation.as_object_mut() else { return operation };
    if !parameters.is_empty() {
        fields.insert("parameters".into(), parameters.into());
    }
    if let Some((schema, _)) = route.body {
        let content = json!({ "application/json": { "schema": schema(generator) } });
        fields.insert("requestBody".into(), json!({ "required": true, "content": content }));
    }
    operation
}

/// A query's fields, one by one, as OpenAPI wants them.
fn query_parameters(query: SchemaOf, generator: &mut SchemaGenerator) -> Vec<Value> {
    let schema = query(&mut *generator).to_value();
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.rsplit('/').next());
    let Some(definition) = name.and_then(|name| generator.definitions_mut().remove(name)) else {
        return vec![];
    };
    let fields = definition.get("properties").and_then(Value::as_object);
    let parameter = |(name, schema): (&String, &Value)| {
        let mut schema = schema.clone();
        let about = schema.as_object_mut().and_then(|fields| fields.remove("description"));
        json!({ "name": name, "in": "query", "description": about, "schema": schema })
    };
    fields.into_iter().flatten().map(parameter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_in_the_document_and_every_reference_leads_somewhere() {
        let document = document();
        for route in ROUTES {
            let method = if route.method == Method::Get { "get" } else { "post" };
            let operation = &document["paths"][route.path][method];
            assert_eq!(operation["summary"], route.about, "{}", route.path);
            assert_eq!(operation.get("requestBody").is_some(), route.body.is_some(), "{}", route.path);
        }
        assert_eq!(document["paths"].as_object().unwrap().len(), ROUTES.len(), "one route for each path");
        let text = document.to_string();
        for reference in text.split("\"$ref\":\"#").skip(1) {
            let path = reference.split('"').next().unwrap();
            assert!(document.pointer(path).is_some(), "{path}");
        }
    }

    #[test]
    fn the_document_is_what_was_reviewed() {
        insta::assert_snapshot!(format!("{:#}", document()));
    }
}
