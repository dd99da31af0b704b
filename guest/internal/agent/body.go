package agent

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"

	"fused/internal/fault"
)

// maxBody is the largest JSON request.
const maxBody = 24 << 20

// decode reads a JSON object into value; an empty body is an empty object.
func decode(w http.ResponseWriter, r *http.Request, value any) error {
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	return parse(body, value)
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil && !errors.As(err, new(*http.MaxBytesError)) {
		err = fault.BadRequest("body", "the request's body was cut off: "+err.Error())
	}
	return body, err
}

func parse(body []byte, value any) error {
	if len(body) == 0 {
		return nil
	}
	err := json.Unmarshal(body, value)
	var wrongType *json.UnmarshalTypeError
	var notBase64 base64.CorruptInputError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &wrongType):
		field := wrongType.Field
		if field == "" {
			field = "body"
		}
		return fault.BadRequest(field, "the field "+field+" must not be a "+wrongType.Value)
	case errors.As(err, &notBase64):
		return fault.BadRequest("stdin_b64", "a field that ends in _b64 is no base64: "+err.Error())
	}
	return fault.BadRequest("body", "the body is no JSON object: "+err.Error())
}

func send(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

func sendJSON(w http.ResponseWriter, status int, value any) error {
	body, err := json.Marshal(value)
	if err == nil {
		send(w, status, body)
	}
	return err
}

func noContent(w http.ResponseWriter) error {
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// flag reads a boolean query parameter.
func flag(r *http.Request, name string, otherwise bool) (bool, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return otherwise, nil
	}
	value, err := strconv.ParseBool(text)
	if err != nil {
		return false, fault.BadRequest(name, name+" must be true or false")
	}
	return value, nil
}
