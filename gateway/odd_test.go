package gateway_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

// oddRequests are such as no dashboard sends.
func oddRequests() []request {
	q := url.QueryEscape
	var out []request
	get := func(path, params string) { out = append(out, request{path: path, params: params}) }
	at := "&time=1700000900"
	all := "&start=1700000015&end=1700000900"
	span := all + "&step=30"
	for _, v := range []string{
		"1e300", "-1e300", "inf", "nan", "0x10", "1_000", "1700000900.0001", "1700000900.9999", "9223372036854775807", "9223372036854775.807",
		"-9223372036854775.808", "2023-11-14 22:28:20", "now", "0", "+5", " 5", "-62135596800", "253402300800", "1e12", "1e18",
	} {
		v = q(v)
		get("/query", "query=up&time="+v)
		get("/query", "query=sum(rate(up[5m]))&time="+v)
		get("/query_range", "query=sum(rate(up[1m]))&start="+v+"&end="+v+"&step=30")
		get("/query_range", "query=sum(rate(up[1m]))"+all+"&step="+v)
		get("/series", "match[]=up&start="+v)
		get("/series", "match[]=up&limit="+v)
		get("/labels", "end="+v)
		get("/label/job/values", "start="+v)
		get("/query_exemplars", "query=http_requests_total&start="+v+"&end=1700000900")
		get("/search/metric_names", "end=1700000900&start="+v)
		get("/query", "query=up&timeout="+v+at)
		get("/query", "query=up&lookback_delta="+v+at)
		get("/query", "query=up&limit="+v+at)
	}
	for _, e := range []string{
		"\xff", "up{job=\"\xff\"}", "up{job=~\"\xff\"}", `{"\xff"}`, `up{job="\xff"}`, "up{job=~\"(\"}", "up{job=~\".*\"}", "up{job!=\"\"}", "{job=\"\"}", `{job!=""}`, `{job=~".+"}`, `{job=~".*"}`,
		"up{}", "{__name__=\"\"}", "{__name__!=\"\"}", "{__name__=~\"\",job=\"job-0\"}", "{__name__=\"up\",__name__!=\"down\"}", "up{__name__=\"up\"}", "{'up'}", "{'up',job='job-0'}", `{"up","x"}`,
		"up offset -5m", "up offset 1000y", "up offset -1000y", "up offset 290y", "rate(up[290y])", "up[290y]", "sum(up[1ms])", "rate(up[1ms])", "up @ 0", "up @ -1", "up @ 1e300", "up @ 9e15", "up @ 1700000300.5555", "up @ start()", "up @ end()", "rate(up[5m] @ end())", "sum(rate(up[5m] @ 1700000300 offset 1m))",
		"up @ inf", "up @ nan", "sum by (job, job) (up)", "sum by () (up)", "sum without () (up)", "sum by (__name__) (up)", "sum by (\"label.with dots\") ({\"métrique.à points\"})", "topk(0, up)", "topk(-1, up)", "topk(NaN, up)", "topk(1e20, up)", "topk(1.9, up)", "topk by (job) (1, up)", "bottomk(scalar(vector(2)), up)", "quantile(NaN, up)", "quantile(-1, up)", "quantile(0.5, up)", "count_values(\"\", up)", "count_values(\"a-b\", up)", "count_values(\"\\xff\", up)", "count_values(\"job\", up)",
		"label_replace(up, \"\", \"$1\", \"job\", \"(.*)\")", "label_replace(up, \"a b\", \"$1\", \"job\", \"(.*)\")", "label_replace(up, \"x\", \"$1\", \"job\", \"(\")", "label_replace(up, \"instance\", \"\", \"\", \"\")", "label_join(up, \"x\", \",\", \"job\", \"a b\")", "label_replace(rate(up[5m]), \"__name__\", \"x\", \"\", \"\")", "label_replace(up, \"__name__\", \"\", \"\", \"\")",
		"vector(scalar(up))", "scalar(up{instance=\"host-0:80\"})", "absent(up)", "absent(nothing{a=\"b\",c=~\"d\"})", "absent_over_time(nothing{a=\"b\"}[5m])", "absent_over_time(up[5m])", "absent(sum(nothing))",
		"sum(native)", "avg(native)", "min(native)", "rate(native[5m])", "sum(rate(native[5m]))", "increase(native[5m])", "histogram_count(native)", "histogram_sum(rate(native[5m]))", "histogram_avg(native)", "histogram_fraction(0, 1, native)", "histogram_quantile(0.5, rate(native[5m]))", "stddev(native)", "topk(1, native)", "count_values(\"v\", native)", "native * 2", "native + native", "native == native", "native / native", "-native", "count(native)", "group(native)", "quantile(0.5, native)", "delta(native[5m])", "sum_over_time(native[5m])", "avg_over_time(native[5m])", "last_over_time(native[5m])", "count_over_time(native[5m])", "max_over_time(native[5m])", "resets(native[5m])", "changes(native[5m])", "idelta(native[2m])", "irate(native[2m])", "deriv(native[5m])", "timestamp(native)", "histogram_stddev(native)", "limitk(2, native)", "native{kind=\"custom\"}", "histogram_quantiles(native, \"q\", 0.5, 0.9)",
		"sum({__name__=~\"native|up\"})", "avg({__name__=~\"native|up\"})", "max({__name__=~\"native|up\"})", "rate({__name__=~\"native|up\"}[5m])", "sum(rate({__name__=~\"native|up|http_requests_total\"}[5m]))", "count({__name__=~\"native|up\"})", "topk(3, {__name__=~\"native|up\"})", "stddev({__name__=~\"native|up\"})", "sum_over_time({__name__=~\"native|up\"}[5m])",
		"up and on() vector(1)", "up / on(job) group_left(x) up", "up * on(job, instance) group_right() up", "up or vector(1)", "up unless up", "up == bool 1", "up > bool up", "1 == 1", "1 == bool 1", "vector(1) == bool 1", "up ^ 2", "up % 0", "-1 ^ 2", "2 ^ 3 ^ 2", "up atan2 up",
		"day_of_month()", "days_in_month(vector(1e300))", "year(vector(NaN))", "minute()", "pi()", "time() - time() offset 5m", "clamp(up, 1, 0)", "clamp_min(up, NaN)", "round(up, 0)", "round(odd_values, 1e-10)", "exp(odd_values)", "ln(odd_values)", "sqrt(odd_values)", "sgn(odd_values)", "ceil(odd_values)", "sort(odd_values)", "sort_desc(odd_values)", "sort_by_label(up, \"job\")", "abs(odd_values)",
		"predict_linear(up[5m], 3600)", "predict_linear(up[5m], NaN)", "double_exponential_smoothing(up[5m], 0.5, 0.5)", "quantile_over_time(0.5, up[5m])", "quantile_over_time(2, up[5m])", "quantile_over_time(NaN, up[5m])", "quantile_over_time(scalar(vector(0.5)), up[5m])", "stdvar_over_time(odd_values[5m])", "deriv(odd_values[5m])", "irate(goes_stale[1m])", "max_over_time(odd_values[10m])", "sum_over_time(odd_values[10m])", "avg_over_time(odd_values[10m])", "avg(odd_values)", "ts_of_last_over_time(up[5m])", "first_over_time(up[5m])", "count_over_time(goes_stale[5m])", "rate(goes_stale[5m])", "present_over_time(nothing[5m])",
		"up[5m:]", "up[5m:0s]", "up[0s:1s]", "up[0s]", "up[5m:1m] offset 1m", "up[5m:1m] @ 1700000300", "rate(up[5m:15s])", "sum(rate(up[5m:1m] @ end()))", "max_over_time(rate(up[1m])[5m:1m])", "avg_over_time(sum(up)[5m:30s] offset 30s)", "count_over_time(vector(1)[5m:1s])", "(up)", "((up))", "(up)[5m:1m]", "up[5m][5m:1m]", "sum(up)[5m]", "(((1)))", "+up", "--up", "- - up", "+\"a\"", "-\"a\"",
		"histogram_quantile(0.9, latency_bucket)", "histogram_quantile(0.9, sum by (le) (latency_bucket))", "histogram_quantile(-1, sum by (le) (latency_bucket))", "histogram_quantile(NaN, sum by (le) (latency_bucket))", "histogram_quantile(0.9, sum by (job) (latency_bucket))", "histogram_quantile(0.9, up)", "histogram_quantile(scalar(vector(0.9)), sum by (le) (rate(latency_bucket[5m])))", "histogram_quantile(0.9, rate(latency_bucket[5m]))", "histogram_quantile(0.9, latency_bucket{le=\"+Inf\"})", "histogram_fraction(0, 1, latency_bucket)", "histogram_quantile(0.9, label_replace(latency_bucket, \"le\", \"x\", \"\", \"\"))",
		"up # comment", "# only comment", "up\n\n", "\tup\r\n", "up;", "up up", "sum(up", "sum up)", "{up}", "up{job=}", "up{job=\"a\",}", "up{,}", "up{job=\"a\",,}", "up{job=\"a\" job=\"b\"}", "up{job==\"a\"}", "1e", "0x", "0xff", "1_000", ".5", "5.", "1e1000", "Inf", "+Inf", "-inf", "NaN", "nan", "1 2", "bool", "sum", "by", "offset", "up offset", "up offset 5", "up[5]", "up[5m", "up[5m:", "up @", "up[1w2d]", "up[2d1w]", "up[1.5h]", "up[-5m]", "up[5m] offset 1m", "rate(up[5m] offset 1m)", "rate(up)[5m]", "rate(up[5m])[5m]", "start()", "end()", "step()", "range()", "up[step()]", "rate(up[5m] anchored)", "rate(up[5m] smoothed)", "up anchored", "up smoothed", "info(up, {a=\"b\"})", "fill(up, 0)", "foo(up)", "rate(up[5m], 1)", "rate()", "abs()", "abs(up, up)", "abs(1)", "vector(up)", "scalar(1)", "time(1)", "absent()", "label_replace(up)", "label_join(up)", "sum(1)", "topk(up, up)", "topk(up)", "sum(5, up)", "quantile(up)", "count_values(up)", "count_values(1, up)", "group_left", "up + group_left up", "up + on(job) group_left group_right up", "up and group_left up", "1 and 1", "up and 1", "\"a\" + \"b\"", "\"a\" == \"b\"", "'a'", "`a`", "\"a", "'\\x'", "\"\\u1234\"", "up{job=`a`}", "up{job='a\\'b'}", "😀", "up{😀=\"a\"}", "{\"😀\"=\"a\"}", "métrique", "sum(métrique)", "métrique{a=\"b\"}",
	} {
		get("/query", "query="+q(e)+at)
		get("/query_range", "query="+q(e)+span+"&stats=all")
	}
	for _, e := range []string{
		"\xff", `up{job="\xff"}`, `up{job=~"\xff"}`, `{"\xff"}`, `{"\xff"="a"}`, `{job=""}`, `{job!=""}`, `{job=~".*"}`, "up{}", `{"up","x"}`, `{__name__="up",__name__!="x"}`, "up up",
		"sum(up)", "up offset 5m", "up[5m]", "up @ 0", "😀", `{"métrique.à points"}`, "", "{}",
	} {
		get("/parse_query", "query="+q(e))
		get("/format_query", "query="+q(e))
		get("/query_exemplars", "query="+q(e)+all)
		get("/series", "match[]="+q(e))
		get("/labels", "match[]="+q(e))
		get("/label/job/values", "match[]=up&match[]="+q(e))
		get("/search/label_values", "label=job&match[]="+q(e)+all)
	}
	for _, l := range []string{
		"U__", "U___", "U__a_62_", "U___62_", "U__a__b", "U__job", "é", "%ff", "%00", "a%20b", "a%2Fb", "a/b", "..", "label.with%20dots", "U__%ff", "9a", "a-b", "%F0%9F%98%80",
		"%", strings.Repeat("a", 5000), "U__" + strings.Repeat("_1F600_", 10),
	} {
		get("/label/"+l+"/values", "match[]=up")
		get("/search/label_values", "label="+l+all)
	}
	for _, p := range []string{
		"match[]=", "match[]=&match[]=up", "match=up", "match[]=up&match[]={job=\"\"}", "match[]=up;drop", "a=%zz", "match[]=up&a=%zz", strings.Repeat("match[]=up&", 300),
	} {
		get("/series", p)
		get("/labels", p)
		out = append(out, request{method: http.MethodPost, path: "/series", params: p})
	}
	for _, p := range []string{"limit=-1", "limit=1", "limit_per_metric=0", "metric=%ff", "metric=", "limit=99999999999999999999"} {
		get("/metadata", p)
		get("/targets/metadata", p)
	}
	for _, h := range []string{
		"Accept-Encoding: gzip;q=0", "Accept-Encoding: *", "Accept-Encoding: br, gzip", "Accept: application/json;q=0", "Accept: text/html", "Content-Type: application/json", "Content-Type: multipart/form-data",
		"Content-Encoding: gzip", "X-Prometheus-Use-Start-Timestamps: true", "X-Prometheus-Use-Start-Timestamps: x", "Origin: null", "Range: bytes=0-5",
	} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			out = append(out, request{method: method, path: "/query", params: "query=up" + at, header: h}, request{method: method, path: "/series", params: "match[]=up", header: h})
		}
	}
	// As `curl -F query=up` sends it. It is no form to the endpoints that ask for one.
	parts := "--B\r\nContent-Disposition: form-data; name=\"query\"\r\n\r\nup\r\n" +
		"--B\r\nContent-Disposition: form-data; name=\"time\"\r\n\r\n1700000900\r\n" +
		"--B\r\nContent-Disposition: form-data; name=\"match[]\"\r\n\r\nup\r\n--B--\r\n"
	for _, path := range []string{"/query", "/query?stats=all", "/query_range?" + span[1:], "/query_exemplars?" + all[1:], "/format_query", "/series", "/labels"} {
		for _, boundary := range []string{"B", "C"} {
			out = append(out, request{method: http.MethodPost, path: path, params: parts, header: "Content-Type: multipart/form-data; boundary=" + boundary})
		}
	}
	return out
}

// TestOddLikePrometheus is TestLikePrometheus of odd requests.
func TestOddLikePrometheus(t *testing.T) {
	ss := dataset()
	p := toPrometheus(t, ss, "search-api")
	base := serve(t, toGateway(t, ss))
	c := client(t)
	n := 0
	for _, r := range oddRequests() {
		if _, err := r.make(t.Context(), base); err != nil {
			continue // not to be sent
		}
		n++
		if diff := gocmp.Diff(r.ask(t, c, p.URL), r.ask(t, c, base)); diff != "" {
			t.Errorf("%.300s: Prometheus -, gateway +\n%.3000s", r, diff)
		}
	}
	t.Logf("%d requests", n)
}
