-- FINISH: the worker ends its job. The token count is checked, so a FINISH that overtakes a lost EMIT is refused.
--
-- ARGV: 1 id, 2 fence, 3 n tokens in the log, 4 state (succeeded | failed), 5 reason, 6 result (JSON)
-- returns 1 ok | 0 lost | 3 gap: the log is not complete, emit first
allow_at_maxmemory()
local h = redis.call('HMGET', JOB .. ARGV[1], 'state', 'fence', 'n')
if h[1] ~= 'running' or h[2] ~= ARGV[2] then return 0 end
if h[3] ~= ARGV[3] then return 3 end
terminal(ARGV[1], ARGV[4], ARGV[5], ARGV[6])
return 1
