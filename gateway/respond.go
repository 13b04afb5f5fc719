package gateway

import (
	"encoding/json"
	"net/http"

	"github.com/prometheus/prometheus/util/annotations"
	v1 "github.com/prometheus/prometheus/web/api/v1"
)

func respond(w http.ResponseWriter, data any, warnings annotations.Annotations) {
	texts, _ := warnings.AsStrings("", 10, 10)
	write(w, http.StatusOK, v1.Response{Status: "success", Data: data, Warnings: texts})
}

func respondError(w http.ResponseWriter, code int, kind string, err error) {
	write(w, code, v1.Response{Status: "error", ErrorType: kind, Error: err.Error()})
}

func write(w http.ResponseWriter, code int, r v1.Response) {
	b, err := json.Marshal(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(b) // the client has gone: nobody to tell
}
