-- EMIT: tokens of many jobs, appended to their logs and published, in one call a decode step. A token exists if and
-- only if it is in the log; the channel is a hint. Explicit ids 0-<n> let XADD itself refuse a repeat or a reorder.
--
-- ARGV: 1 lease in ms, then per job: id, fence, n after this chunk, tokens in it, payload (one line of JSON)
-- returns per job 1 ok | 0 lost (fenced out, cancelled, ended) | 2 duplicate of a call whose reply was lost | 3 gap |
--         4 ok, but nobody listens who should
allow_at_maxmemory()
local t, lease, out, lines = now(), tonumber(ARGV[1]), {}, {}
for i = 2, #ARGV, 5 do
  local id, fence, n, k, payload = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), ARGV[i + 4]
  local h = redis.call('HMGET', JOB .. id, 'state', 'fence', 'n', 'inbox', 'deadline_ms')
  local status
  if h[1] ~= 'running' or h[2] ~= fence or fence == '' then status = 0
  elseif tonumber(h[3]) >= n then status = 2
  elseif tonumber(h[3]) ~= n - k then status = 3
  else
    redis.call('XADD', LOG .. id, '0-' .. n, 'k', k, 'd', payload)
    if h[3] == '0' then redis.call('PEXPIREAT', LOG .. id, h[5] + SAFETY_MS) end   -- a log never outlives its job
    redis.call('HSET', JOB .. id, 'n', n)
    redis.call('ZADD', LEASE, t + lease, id)
    local inbox = lines[h[4]]
    if not inbox then inbox = {at = {}}; lines[h[4]] = inbox end
    inbox.at[#inbox.at + 1] = #out + 1
    inbox[#inbox + 1] = id .. ' ' .. n .. ' ' .. k .. ' ' .. payload
    status = 1
  end
  out[#out + 1] = status
end
for inbox, rows in pairs(lines) do
  if publish(inbox, table.concat(rows, '\n')) == 0 and not string.find(inbox, '*', 1, true) then
    for _, i in ipairs(rows.at) do out[i] = 4 end
  end
end
return out
