import type { BodyIn, ResponseOf } from '@fleetkey/protocol/admin.ts'
import { duration, exit, number, text, UsageError, type Command, type Invocation } from '../command.ts'
import { facts } from '../output.ts'
import { groupId } from './group.ts'
import { impactText } from './impact.ts'

type Policy = ResponseOf<'group.policy.get'>
type Change = BodyIn<'group.policy.set'>

/** One of a few words, or a usage error that names the option and the words. */
const word = <W extends string>(call: Invocation, option: string, words: readonly W[]): W | undefined => {
  const given = text(call, option)
  const known = words.find((one) => one === given)
  if (given !== undefined && known === undefined) throw new UsageError(`--${option} takes ${words.join(', ')}, not ${given}`)
  return known
}

const onOff = (call: Invocation, option: string): boolean | undefined => {
  const given = word(call, option, ['on', 'off'])
  return given === undefined ? undefined : given === 'on'
}

const deliveries = ['auto', 'unicast', 'broadcast'] as const
const severities = ['quarantine', 'warn'] as const

/** `any`, or ids separated by commas. */
const releasesOf = (given: string | undefined): Policy['releases'] | undefined => {
  if (given === undefined || given === 'any') return given
  const ids = given.split(',').map((id) => id.trim())
  const wrong = ids.find((id) => !/^[a-z0-9][a-z0-9-]*\/[A-Za-z0-9][A-Za-z0-9._-]*$/.test(id))
  if (wrong !== undefined) throw new UsageError(`--releases takes any or MODEL/NAME,MODEL/NAME…, not ${wrong}`)
  return ids
}

/** The word after the group. */
const deliveryOf = (call: Invocation): Policy['delivery'] | undefined => {
  const given = call.args[1]
  const known = deliveries.find((one) => one === given)
  if (given !== undefined && known === undefined) throw new UsageError(`keys reach a group by ${deliveries.join(', ')}, not ${given}`)
  return known
}

const whole = (value: number | undefined): number | undefined => (value === undefined ? undefined : Math.round(value))

/** What the command line changes: one row per option. */
const changeOf = (call: Invocation): Change => {
  const age = duration(call, 'attest-age')
  const life = duration(call, 'generation-life')
  const given: { [P in keyof Change]: Change[P] | undefined } = {
    connectionProof: onOff(call, 'connection-proof'),
    rotateOnLeave: onOff(call, 'rotate-on-leave'),
    rotateOnJoin: onOff(call, 'rotate-on-join'),
    rotateOnQuarantine: onOff(call, 'rotate-on-quarantine'),
    history: onOff(call, 'history'),
    delivery: deliveryOf(call),
    broadcastFrom: whole(number(call, 'broadcast-from', 1, 10_000_000)),
    generationShare: number(call, 'generation-share', 0.001, 0.9),
    generationLife: life === undefined ? undefined : Math.round(life / 1000),
    releases: releasesOf(text(call, 'releases')),
    minimumRelease: whole(number(call, 'minimum-release', 0, 0xffff_ffff)),
    onUnknown: word(call, 'on-unknown', severities),
    onWithdrawn: word(call, 'on-withdrawn', severities),
    onDebug: word(call, 'on-debug', severities),
    ima: word(call, 'ima', ['ignored', 'required', 'listed']),
    onUnlisted: word(call, 'on-unlisted', severities),
    assurance: word(call, 'assurance', ['token', 'simulated', 'idevid', 'attested']),
    attestAge: age === undefined ? undefined : Math.round(age / 1000),
  }
  const change = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)) as Change
  if (Object.keys(change).length === 0) throw new UsageError('name what to change')
  return change
}

const shown = (policy: Policy): string =>
  facts({
    'connection-proof': policy.connectionProof ? 'on' : 'off',
    'rotate-on-leave': policy.rotateOnLeave ? 'on' : 'off',
    'rotate-on-join': policy.rotateOnJoin ? 'on' : 'off',
    'rotate-on-quarantine': policy.rotateOnQuarantine ? 'on' : 'off',
    history: policy.history ? 'on' : 'off',
    delivery: policy.delivery === 'auto' ? `auto: broadcast from ${policy.broadcastFrom} members` : policy.delivery,
    'generation-share': policy.generationShare,
    'generation-life': `${policy.generationLife}s`,
    releases: policy.releases === 'any' ? 'any' : policy.releases.join(',') || 'none',
    'minimum-release': policy.minimumRelease,
    'on-unknown': policy.onUnknown,
    'on-withdrawn': policy.onWithdrawn,
    'on-debug': policy.onDebug,
    ima: policy.ima,
    'on-unlisted': policy.onUnlisted,
    assurance: policy.assurance,
    'attest-age': `${policy.attestAge}s`,
  })

const string = { type: 'string' } as const

export const policyCommands: readonly Command[] = [
  {
    name: 'group policy get',
    usage: 'GROUP',
    summary: 'policy of a group',
    args: [1, 1],
    async run(call) {
      const policy = await call.client().call('group.policy.get', { params: { id: groupId(call.args[0] ?? '') } })
      call.out.result(policy, () => shown(policy))
      return exit.ok
    },
  },
  {
    name: 'group policy set',
    usage: [
      'GROUP [auto|unicast|broadcast] [--broadcast-from N] [--generation-share SHARE] [--generation-life DURATION]',
      '[--connection-proof on|off] [--rotate-on-leave on|off] [--rotate-on-join on|off] [--rotate-on-quarantine on|off] [--history on|off]',
      '[--releases any|MODEL/NAME,…]',
      '[--minimum-release N] [--on-unknown|--on-withdrawn|--on-debug quarantine|warn] [--assurance token|simulated|idevid|attested]',
      '[--ima ignored|required|listed] [--on-unlisted quarantine|warn] [--attest-age DURATION] [--dry-run]',
    ].join(' '),
    summary: 'change the policy; of several groups the strictest wins; --dry-run says whom it would quarantine and changes nothing',
    args: [1, 2],
    options: {
      'connection-proof': string,
      'rotate-on-leave': string,
      'rotate-on-join': string,
      'rotate-on-quarantine': string,
      history: string,
      'broadcast-from': string,
      'generation-share': string,
      'generation-life': string,
      releases: string,
      'minimum-release': string,
      'on-unknown': string,
      'on-withdrawn': string,
      'on-debug': string,
      ima: string,
      'on-unlisted': string,
      assurance: string,
      'attest-age': string,
      'dry-run': { type: 'boolean', default: false },
    },
    async run(call) {
      const of = { params: { id: groupId(call.args[0] ?? '') }, body: changeOf(call) }
      if (call.options['dry-run'] === true) {
        const impact = await call.client().call('group.policy.preview', of)
        call.out.result(impact, () => impactText(impact, 'would be quarantined'))
        return exit.ok
      }
      const policy = await call.client().call('group.policy.set', of)
      call.out.result(policy, () => shown(policy))
      return exit.ok
    },
  },
]
