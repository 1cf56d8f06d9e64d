-- DROP: a dead job is forgotten, with its tokens.
--
-- ARGV: 1 id
-- returns 1 ok | 0 it is not dead, or gone
allow_at_maxmemory()
local h = redis.call('HMGET', JOB .. ARGV[1], 'state', 'dead_sid')
if h[1] ~= 'dead' then return 0 end
redis.call('XDEL', DEAD, h[2])
redis.call('DEL', JOB .. ARGV[1], LOG .. ARGV[1])
return 1
